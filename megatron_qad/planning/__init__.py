"""Level 4: memory and time of a job, computed from the models' configs and the layout, without building anything."""
