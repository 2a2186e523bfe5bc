"""Optional speedups for demos on a CPU, without any effect on results."""
