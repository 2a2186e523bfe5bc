"""Level 6: evaluations of models on the tokens of a job's validation, and their comparison."""
