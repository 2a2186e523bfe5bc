"""NAME=PATH arguments of the tools that compare several runs or results."""

from collections.abc import Iterable

from megatron_qad.engine.errors import QADError


def parse_named(texts: Iterable[str], what: str, flag: str = "") -> dict[str, str]:
    """Parse ["PTQ=DIR", ...] into {"PTQ": "DIR", ...}, in order.

    Args:
        what: what a path names, such as "DIR", for messages.
        flag: flag of the arguments; empty for positional ones.

    Raises:
        QADError: an argument without a name or a path, or a name that is given twice.
    """
    paths: dict[str, str] = {}
    for text in texts:
        name, _, path = text.partition("=")
        problem = f"{flag} {text!r}".strip() + f": expected NAME={what}, with a different name for each"
        if not name or not path:
            raise QADError(f"{problem}, such as QAD=runs/qad.")
        if name in paths:
            raise QADError(f"{problem}; {name!r} is given twice.")
        paths[name] = path
    return paths
