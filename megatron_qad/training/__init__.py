"""Floor 3: what happens in a step: the teacher's pass, the wrapped schedule, the loss, validation."""
