"""Level 2: quantization policies, activation quantizers (through modelopt), in-place weights, and smoothing."""
