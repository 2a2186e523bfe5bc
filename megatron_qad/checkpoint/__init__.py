"""Level 3: import from Hugging Face to torch_dist, export to Hugging Face (BF16 or quantized), export validation."""
