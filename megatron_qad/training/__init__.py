"""Floor 4: a job: its models, its loss, what surrounds the student's schedule in a step, and its callbacks."""
