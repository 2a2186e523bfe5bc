"""Level 3: reads flags, YAML files and model configs into one frozen object, and checks them."""
