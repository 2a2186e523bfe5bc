"""Finds the name that a mistyped one stands for."""

import difflib
from collections.abc import Iterable


def did_you_mean(value: object, valid: Iterable[str]) -> str:
    """Return ``" (did you mean 'mlp'?)"``, or an empty string if no valid value is similar."""
    close = difflib.get_close_matches(str(value), list(valid), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
