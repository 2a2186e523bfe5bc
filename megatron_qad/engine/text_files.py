"""Reads text, JSON and YAML that others wrote; a damaged or hostile file is one ``QADError`` that names it."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from megatron_qad.engine.errors import QADError

_MAX_JSON_LEVELS = 100
"""Largest depth of JSON: Python reads about 1,000 levels, but cannot copy or write as many."""
_MAX_YAML_NODES = 100_000
"""Largest number of YAML values after aliases are expanded: a few nested aliases can stand for billions of values."""


def read_text(file: Path) -> str:
    """Return the text of a UTF-8 file. Raises QADError if it is missing, unreadable or has another encoding."""
    try:
        return Path(file).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise QADError(f"{file}: cannot be read ({error.strerror}). Check the path.") from error
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise QADError(
            f"{file}: not UTF-8: byte {byte:#04x} at position {error.start}. Convert the file to UTF-8."
        ) from error


def read_json(file: Path, advice: str = "Download it again.") -> dict[str, Any]:
    """Return the JSON object in a file. Raises QADError for anything else, which ends with ``advice``."""
    content = parse_json(read_text(file), str(file), advice)
    if not isinstance(content, dict):
        raise QADError(f"{file}: expected a JSON object, found a {type(content).__name__}. {advice}")
    return content


def parse_json(text: str | bytes, name: str, advice: str) -> Any:
    """Return the JSON value in a text. ``name`` starts the error, ``advice`` is its last sentence.

    Raises:
        QADError: not JSON, not UTF-8, or more than 100 levels deep.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise QADError(f"{name}: its JSON is nested too deeply. {advice}".rstrip()) from error
    except ValueError as error:
        raise QADError(f"{name}: not valid JSON ({error}). {advice}".rstrip()) from error
    level, children = 0, [content]
    while children := [part for value in children for part in _parts(value)]:
        level += 1
        if level > _MAX_JSON_LEVELS:
            raise QADError(f"{name}: its JSON is nested too deeply. {advice}".rstrip())
    return content


def _parts(value: Any) -> Iterable[Any]:
    """Return the objects and lists inside of a value."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (part for part in parts if isinstance(part, dict | list))


def read_yaml(file: Path, name: str) -> Any:
    """Return the value in a YAML file. ``name`` starts the error, such as ``--config FILE``.

    Raises:
        QADError: the file cannot be read, is not valid YAML, has a key twice in a mapping, is nested too deeply, or its
            aliases expand to more than 100,000 values.
    """
    text = read_text(file)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and _num_values(node, {}) > _MAX_YAML_NODES:
            raise QADError(f"{name}: its aliases expand to more than {_MAX_YAML_NODES:,} values. Write them out.")
        if node is not None and (key := _repeated_key(node)) is not None:
            raise QADError(
                f"{name}: the key {key.value!r} is there twice (line {key.start_mark.line + 1}). Remove one."
            )
        return yaml.safe_load(text)
    except RecursionError as error:
        raise QADError(f"{name}: its YAML is nested too deeply, or an alias contains itself.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise QADError(f"{name}: not valid YAML: {error}") from error


def _num_values(node: yaml.Node, known: dict[int, int]) -> int:
    """Return the number of values in a YAML node, counting the target of an alias at each use."""
    if id(node) not in known:
        children = []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        known[id(node)] = 1 + sum(_num_values(child, known) for child in children)
    return known[id(node)]


def _repeated_key(node: yaml.Node) -> yaml.ScalarNode | None:
    """Return a key that a mapping has twice. PyYAML takes the last one."""
    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys: set[tuple[str, str]] = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if (key.tag, key.value) in keys:
                        return key
                    keys.add((key.tag, key.value))
                waiting += [key, value]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
    return None
