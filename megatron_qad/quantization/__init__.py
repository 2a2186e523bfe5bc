"""Floor 2: which GEMMs are NVFP4 (the policy), their activations (through modelopt) and their weights (in place)."""
