"""Prompts for data generation: a text file with one user message per line, or JSON lines with whole conversations."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_qad.engine.errors import QADError


@dataclass(frozen=True)
class Prompt:
    """The messages that the model answers."""

    messages: list[dict[str, Any]]
    """Messages with "role" and "content", as for a chat template."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Other fields of the record, such as "answer". The generated line has them, too."""

    @classmethod
    def of(cls, prompt: "str | Prompt") -> "Prompt":
        """Return a user's message as a prompt; a prompt unchanged."""
        return prompt if isinstance(prompt, cls) else cls([{"role": "user", "content": prompt}])


def read_prompts(path: str | Path) -> Sequence[str | Prompt]:
    """Read the prompts of a file; blank lines are skipped.

    ``.jsonl`` files have one object per line, with "prompt" (a string) or "messages" (a list). Other files are text,
    with one message of the user per line.

    Raises:
        QADError: the file is missing, not UTF-8, or empty, or a line is not such an object.
    """
    try:
        # splitlines() and text mode would also end a line at other characters (U+2028, \x0b, a lone \r).
        lines = Path(path).read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise QADError(
            f"--prompts {path} cannot be read: {error}. Expected UTF-8 text, one prompt per line."
        ) from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise QADError(f"--prompts {path} has no prompt. Expected one prompt per line.")
    if Path(path).suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_parse(line, f"--prompts {path}, line {number}") for number, line in numbered]


def _parse(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()  # a lone surrogate could not be written
    except (ValueError, RecursionError) as error:
        raise QADError(f'{where}: {error}. Expected a JSON object with "prompt" or "messages".') from error
    found = [key for key in ("prompt", "messages") if isinstance(record, dict) and record.get(key) is not None]
    if len(found) != 1:
        raise QADError(f'{where}: expected a JSON object with either "prompt" or "messages", found {line:.80}.')
    fields = {key: value for key, value in record.items() if key not in ("prompt", "messages")}
    if reserved := fields.keys() & {"finish", "text", "input_ids", "conversations"}:
        raise QADError(f"{where}: the generated line cannot also have {', '.join(sorted(reserved))}. Rename the field.")
    if found == ["prompt"]:
        if not isinstance(record["prompt"], str) or not record["prompt"].strip():
            raise QADError(f'{where}: "prompt" is {record["prompt"]!r:.50}, expected a string with text.')
        return Prompt(Prompt.of(record["prompt"]).messages, fields)
    messages = record["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise QADError(
            f'{where}: "messages" is {messages!r:.50}, expected a list of objects with "role" and "content".'
        )
    if messages[-1]["role"] == "assistant":
        raise QADError(
            f"{where}: the last message is the assistant's, so there is nothing to answer. Remove the message."
        )
    return Prompt(messages, fields)
