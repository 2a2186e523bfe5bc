"""Run directories: atomic saves, checksums, locks, and unpickling that runs no code from a file."""
