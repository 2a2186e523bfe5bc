"""Counts in sentences."""


def count(number: int, noun: str) -> str:
    """Return a number and a noun, which gets an "s" unless the number is 1: "1 document", "0 documents"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
