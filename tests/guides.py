"""The pages in docs/howto as data, for tests that run their code."""

import re
import textwrap
from pathlib import Path

HOWTO = Path(__file__).parents[1] / "docs" / "howto"
_BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


def code_of(page: str) -> dict[str, str]:
    """The Python blocks of a page by the file that a block's first line names, and its other blocks by language."""
    found = {}
    for language, block in _BLOCK.findall((HOWTO / page).read_text()):
        block = textwrap.dedent(block)
        first, _, rest = block.partition("\n")
        key, block = (first.removeprefix("# "), rest) if language == "python" else (language, block)
        assert key not in found, f"{page}: two blocks of {key}"
        found[key] = block
    return found


def run(code: str, name: str, **given) -> dict:
    """The names that a block defines; ``name`` stands for its file in a traceback."""
    namespace = {"__name__": name, **given}
    exec(compile(code, name, "exec"), namespace)
    return namespace
