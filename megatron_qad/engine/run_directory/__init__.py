"""What a run directory needs: atomic saves, checksums, locks, and reading it without running code."""
