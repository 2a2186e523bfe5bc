"""Reads the code blocks of the pages in docs/howto for tests that run them."""

import re
import textwrap
from pathlib import Path

HOWTO = Path(__file__).parents[1] / "docs" / "howto"
_BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


def code_of(page: str) -> dict[str, str]:
    """Return the code blocks of a page: Python by the file named in the first line, others by language."""
    blocks = {}
    for language, block in _BLOCK.findall((HOWTO / page).read_text()):
        block = textwrap.dedent(block)
        first, _, body = block.partition("\n")
        key, block = (first.removeprefix("# "), body) if language == "python" else (language, block)
        assert key not in blocks, f"{page}: two blocks for {key}"
        blocks[key] = block
    return blocks


def run(code: str, name: str, **variables) -> dict:
    """Execute a block and return the names it defines. ``name`` is the file name in tracebacks."""
    namespace = {"__name__": name, **variables}
    exec(compile(code, name, "exec"), namespace)
    return namespace
