"""Level 5: the job: its models, its loss, the passes of a step, and its callbacks."""
