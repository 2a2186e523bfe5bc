"""Finds the shell commands of a Markdown page, for tests that parse or run them.

Commands are all lines of blocks marked ``bash``; lines of indented blocks that begin with a known program; and code in
the text that does. Variables that a page sets (``NAME=value``) are replaced in its later commands.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("python", "megatron-qad", "make", "torchrun", "sbatch", "srun", "bash", "pytest", "pip", "hf", "vllm")
SCRIPTS = ("launch/", "examples/")
_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
_ASSIGNMENT = re.compile(r"^(\w+)=(?!\$\()(\"[^\"]*\"|'[^']*'|\S*)$")
_SUBSTITUTION = re.compile(r"^\w+=\$\((.*)\)$")
_SEPARATORS = {"|", "||", "&&", "&", ";"}


@dataclass(frozen=True)
class Command:
    """One command of a page."""

    words: tuple[str, ...]
    """The words as the shell passes them, without variables in front and without redirections."""
    line: str
    """As it is written, variables replaced."""
    is_block: bool
    """Whether it is in a block marked ``bash``, whose commands are complete."""


def commands_of(page: Path) -> list[Command]:
    """Return the commands of a page in their order, those of the text last."""
    text, variables, commands = page.read_text(), {}, []
    fences = [match for match in _FENCE.finditer(text)]
    outside = _FENCE.sub(lambda match: "\n" * match.group().count("\n"), text)
    blocks = [(match.start(), match.group(2), True) for match in fences if match.group(1) == "bash"]
    blocks += [(i, line, False) for i, line in _indented_lines(outside)]
    for _, block, is_marked in sorted(blocks):
        for line in re.sub(r" *\\\n *", " ", block).splitlines():
            commands += _read(line.strip(), variables, is_marked)
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", outside):
        if _is_command(code):
            commands += _read(code, {}, False)
    return commands


def _indented_lines(text: str) -> list[tuple[int, str]]:
    """Return the lines of indented blocks that begin with a program, continued lines joined, with their offsets."""
    joined = re.sub(r" *\\\n *", " ", text)
    found, offset = [], 0
    for line in joined.splitlines(keepends=True):
        if line.startswith("    ") and (_is_command(line.strip()) or _ASSIGNMENT.match(line.strip())):
            found.append((offset, line.strip()))
        offset += len(line)
    return found


def _is_command(text: str) -> bool:
    """Whether a text begins with a known program, and has more than its name."""
    parts = [word for word in text.split() if not re.match(r"[A-Za-z_]\w*=", word)]
    if _SUBSTITUTION.match(text):
        return _is_command(_SUBSTITUTION.match(text).group(1))
    is_script = len(parts) > 1 and parts[0].startswith(SCRIPTS) and "." in parts[0]
    return is_script or (len(parts) > 1 and parts[0] in PROGRAMS)


def _read(line: str, variables: dict[str, str], is_block: bool) -> list[Command]:
    if not line or line.startswith("#"):
        return []
    line = re.sub(r"\$\{?(\w+)\}?", lambda match: variables.get(match.group(1), match.group()), line)
    if match := _ASSIGNMENT.match(line):
        variables[match.group(1)] = match.group(2).strip("\"'")
        return []
    if match := _SUBSTITUTION.match(line):
        line = match.group(1)
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    commands, words = [], []
    for word in [*lexer, ";"]:
        if word in _SEPARATORS:
            commands += [words] if words else []
            words = []
        else:
            words.append(word)
    return [Command(tuple(_without_extras(words)), line, is_block) for words in commands]


def _without_extras(words: list[str]) -> list[str]:
    """Remove variables in front, and redirections."""
    while words and re.match(r"[A-Za-z_]\w*=", words[0]):
        words = words[1:]
    end = next((i for i, part in enumerate(words) if set(part) <= {"<", ">"}), len(words))
    return words[:end]
