"""Floor 3: Hugging Face -> torch_dist, torch_dist -> Hugging Face in BF16 and NVFP4, and the validator of what was
written."""
