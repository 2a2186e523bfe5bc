"""ShareGPT records (``conversations`` with ``from`` and ``value``) to records with ``messages``."""

import json
from typing import Any

from megatron_qad.data.bad_document import BadDocument

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
_CALLS = ("function_call", "tool_call")


def with_messages(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with "conversations" as one with "messages"; any other record is returned unchanged.

    "human" is the user, "gpt" the assistant; "function_call" is a tool call of the assistant, with the call or a list
    of calls as JSON text, and "observation" its result. A "system" key of the record is the first message. Turns that
    have "role" and "content" are taken as they are.

    Raises:
        BadDocument: a turn is not an object, comes from someone unknown, or has no JSON of a call.

    Example::

        with_messages({"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]})
        # {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    """
    turns = record.get("conversations")
    if turns is None or record.get("messages") is not None:
        return record
    if not isinstance(turns, list) or not turns:
        raise BadDocument("'conversations' is not a non-empty list of objects with 'from' and 'value'")
    messages = [_message(turn, f"conversations[{i}]") for i, turn in enumerate(turns)]
    system = record.get("system")
    if isinstance(system, str) and system and messages[0].get("role") != "system":
        messages.insert(0, {"role": "system", "content": system})
    rest = {key: value for key, value in record.items() if key not in ("conversations", "system")}
    if rest.get("tools") == "":
        del rest["tools"]
    return rest | {"messages": messages}


def _message(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise BadDocument(f"{where} is not an object with 'from' and 'value'")
    if turn.get("from") is None and turn.get("role") is not None:
        return turn
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker.lower() not in _ROLES:
        raise BadDocument(f"{where}: 'from' is {str(speaker)[:30]!r}, expected one of {', '.join(_ROLES)}")
    role, value = _ROLES[speaker.lower()], turn.get("value")
    message = {"role": role, "content": value}
    if speaker.lower() in _CALLS:
        message = {"role": role, "content": None, "tool_calls": _calls(value, where)}
    return message | ({"weight": turn["weight"]} if turn.get("weight") is not None else {})


def _calls(value: Any, where: str) -> list:
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise BadDocument(f"{where}: the tool call is not JSON: {error}") from error
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise BadDocument(f"{where}: expected a tool call, an object with 'name' and 'arguments', or a list of them")
    return calls
