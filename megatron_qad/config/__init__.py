"""Floor 3: flags, YAML files and the models' configs as one frozen object, and every refusal of them."""
