"""Reads text, JSON and YAML that others wrote; a damaged or hostile file is one ``QADError`` that names it."""

import json
from pathlib import Path
from typing import Any

import yaml

from megatron_qad.engine.errors import QADError

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


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises QADError for anything else."""
    try:
        content = json.loads(read_text(file))
    except RecursionError as error:
        raise QADError(f"{file}: its JSON is nested too deeply. Download it again.") from error
    except ValueError as error:
        raise QADError(f"{file}: not valid JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise QADError(f"{file}: expected a JSON object, found a {type(content).__name__}. Download it again.")
    return content


def read_yaml(file: Path, name: str) -> Any:
    """Return the value in a YAML file. ``name`` starts the error, such as ``--config FILE``.

    Raises:
        QADError: the file cannot be read, is not valid YAML, is nested too deeply, or its aliases expand to more than
            100,000 values.
    """
    text = read_text(file)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and _num_values(node, {}) > _MAX_YAML_NODES:
            raise QADError(f"{name}: its aliases expand to more than {_MAX_YAML_NODES:,} values. Write them out.")
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
