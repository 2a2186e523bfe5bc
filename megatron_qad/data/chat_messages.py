"""A JSON record with ``messages`` to the form that chat templates expect, as inference servers do it.

Servers (vLLM, SGLang) change a request before they render it: content that is null becomes an empty string, parts of
text are joined, JSON text of tool-call arguments is parsed, keys that are null are absent. A template that receives the
unchanged record prints ``None`` or ``[{'type': ...`` into the text. What no server could render is a ``BadDocument``.
"""

import json
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_qad.data.bad_document import BadDocument
from megatron_qad.data.images.image_parts import IMAGE_PART, ChatImages

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Type of a content part -> the key of its text. The types are those of OpenAI's two APIs, which vLLM also accepts."""
_STRUCTURED = {"tools", "functions", "tool_calls", "function_call", "documents", "chat_template_kwargs"}
"""Keys whose values are objects or lists of objects."""
_RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize"}
"""Names that ``chat_template_kwargs`` cannot give to a template."""


@dataclass(frozen=True)
class Chat:
    """One conversation in the form that chat templates expect."""

    messages: list[dict]
    """Messages with a "role" and a "content": a string, or a list of ``{"type": "text", "text": str}`` and, in chats
    with images, ``{"type": "image"}``. Tool calls are ``{"type": "function", "function": {"name": str, "arguments":
    dict}}``. No key is null or an empty list."""
    tools: list[dict] | None = None
    """JSON schemas of the tools, or None."""
    documents: list[dict] | None = None
    """Documents of retrieval-augmented generation, or None."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further variables of the template, such as ``enable_thinking``."""
    is_truncated: bool = False
    """Whether the last turn that counts ends in the middle."""
    images: ChatImages | None = None
    """Images of the messages; None: prepared without images."""

    def assistant_turns(self) -> list[int]:
        """Return the indices of the assistant's messages that count: all without ``"weight": 0``."""
        return [i for i, m in enumerate(self.messages) if m["role"] == "assistant" and m.get("weight", 1)]


def parse_chat(record: dict[str, Any], images: ChatImages | None = None) -> Chat:
    """Return the conversation of a JSON record.

    Args:
        record: has "messages" and, optionally, "tools" (or "functions", OpenAI's older format), "documents" and
            "chat_template_kwargs", with the meaning that they have in a request to a server, and "finish", which is
            "length" if the last message is truncated.
        images: what ``take_images`` returned with the record. Without it, parts of images are errors.

    Raises:
        BadDocument: a key has the wrong type, a message has no text that could be rendered, or no message of the
            assistant counts.

    Example::

        chat = parse_chat({"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]})
    """
    record = _without_nulls(record)
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise BadDocument("'messages' is not a non-empty list of objects with a 'role'")
    kwargs = record.get("chat_template_kwargs", {})
    if not isinstance(kwargs, dict) or kwargs.keys() & _RESERVED:
        raise BadDocument(f"'chat_template_kwargs' is not an object without the keys {', '.join(sorted(_RESERVED))}")
    documents = record.get("documents")
    if documents is not None and not _is_list_of_objects(documents):
        raise BadDocument(f"'documents' is {_kind(documents)}, expected a list of objects")
    messages = [_message(m, f"messages[{i}]", images is not None) for i, m in enumerate(messages)]
    chat = Chat(messages, _tools(record), documents, kwargs, images=images)
    if record.get("finish") == "length" and chat.assistant_turns()[-1:] == [len(messages) - 1]:
        chat = replace(chat, is_truncated=True)
    if not chat.assistant_turns():
        roles = ", ".join(sorted({repr(m["role"]) for m in chat.messages})[:5])
        weights = " and a weight other than 0" if any(m["role"] == "assistant" for m in chat.messages) else ""
        raise BadDocument(
            f"no message has the role 'assistant'{weights}, so no token would count in the loss; its roles are {roles}"
        )
    return chat


def _tools(record: dict[str, Any]) -> list[dict] | None:
    """Return the schemas in "tools", which may be JSON text, or in "functions"."""
    tools, functions = record.get("tools"), record.get("functions")
    if isinstance(tools, str):
        tools = _from_json(tools, "'tools' is text that") or None
    if tools is not None and functions is not None:
        raise BadDocument("has both 'tools' and 'functions'")
    for key, value in (("tools", tools), ("functions", functions)):
        if value is not None and not _is_list_of_objects(value):
            raise BadDocument(f"'{key}' is {_kind(value)}, expected a list of objects (JSON schemas)")
    return tools if functions is None else [{"type": "function", "function": f} for f in functions]


def _message(message: dict[str, Any], where: str, has_images: bool) -> dict[str, Any]:
    message = _without_nulls(message)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        found = _kind(role) if "role" in message else "null or absent"
        raise BadDocument(f"{where}: 'role' is {found}, expected a string such as 'user' or 'assistant'")
    where = f"{where} ({role[:20]})"
    for key in ("name", "tool_call_id", "reasoning_content", "reasoning"):
        if key in message and not isinstance(message[key], str):
            raise BadDocument(f"{where}: '{key}' is {_kind(message[key])}, expected a string")
    if message.get("weight", 1) not in (0, 1):
        raise BadDocument(f"{where}: 'weight' is {message['weight']!r}, expected 0 or 1")
    if role == "function":  # the result of a call in OpenAI's older format
        message["role"] = "tool"
    calls = _tool_calls(message, where)
    if calls:
        message["tool_calls"] = calls
    message.pop("function_call", None)
    # vLLM calls it "reasoning" now and gives templates both names.
    thought = message.get("reasoning_content", message.get("reasoning"))
    if thought is not None:
        message["reasoning_content"] = message["reasoning"] = thought
    if role == "assistant" and "content" not in message and not calls and not thought:
        raise BadDocument(
            f"{where}: has neither content nor tool calls nor reasoning, so there is nothing to learn. If the model "
            'answered with nothing, write "content": ""'
        )
    message["content"] = _content(message.get("content", ""), where, has_images)
    return message


def _content(content: Any, where: str, has_images: bool) -> str | list[dict[str, str]]:
    """Return content as a string or as a list of parts in one form."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadDocument(f"{where}: 'content' is {_kind(content)}, expected a string or a list of text parts")
    return [
        dict(IMAGE_PART)
        if has_images and part == IMAGE_PART
        else {"type": "text", "text": _part_text(part, f"{where}: content[{i}]")}
        for i, part in enumerate(content)
    ]


def text_of(part: dict[str, str]) -> str:
    """Return the text of a part of content; an image has none."""
    return part.get("text", "")


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise BadDocument(f"{where} is {_kind(part)}, expected a text part")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        raise BadDocument(f"{where} has the type {str(kind)[:30]!r}; only text can be used, not images, audio or files")
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise BadDocument(f"{where}: '{_TEXT_PARTS[kind]}' is {_kind(text)}, expected a string")
    return text


def _tool_calls(message: dict[str, Any], where: str) -> list[dict]:
    """Return the calls in "tool_calls", or in "function_call" of OpenAI's older format, in one form."""
    calls, old = message.get("tool_calls"), message.get("function_call")
    if isinstance(calls, str):
        calls = _from_json(calls, f"{where}: 'tool_calls' is text that") or None
    if calls is None and old is None:
        return []
    if message["role"] != "assistant":
        raise BadDocument(f"{where}: has a tool call, which only a message of the assistant can have")
    if calls is not None and old is not None:
        raise BadDocument(f"{where}: has both 'tool_calls' and 'function_call'")
    if not isinstance(calls, list | None):
        raise BadDocument(f"{where}: 'tool_calls' is {_kind(calls)}, expected a list")
    if old is not None:
        return [_call(old, f"{where}: 'function_call'")]
    return [_call(call, f"{where}: tool_calls[{i}]") for i, call in enumerate(calls)]


def _call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise BadDocument(f"{where} is {_kind(call)}, expected an object")
    call = _without_nulls(call)
    if "function" not in call and "name" in call:  # {"name", "arguments"}, as several models write it
        call = {"function": call}
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadDocument(f"{where} has no 'function' with a 'name'")
    name, arguments = function["name"], function.get("arguments")
    if isinstance(arguments, str):
        arguments = _from_json(arguments or "null", f"{where}: the arguments of {name[:50]!r}")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise BadDocument(f"{where}: the arguments of {name[:50]!r} are {_kind(arguments)}, expected an object")
    return {"type": "function"} | call | {"function": function | {"arguments": arguments}}


def _from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadDocument(f"{what} is not JSON: {error}") from error


def _without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    """Return a copy without the keys that are null or an empty list: libraries write them for what is absent.

    Tables write an empty string, or an object whose values are all null, for a call or a list of tools that is absent.
    """
    return {key: item for key, item in value.items() if not _is_absent(item, key in _STRUCTURED)}


def _is_absent(item: Any, is_structured: bool) -> bool:
    if is_structured and (item == "" or isinstance(item, dict) and all(part is None for part in item.values())):
        return True
    return item is None or item == []


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _kind(value: Any) -> str:
    """Return JSON's name of a value's type, with short values."""
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return f"{'a boolean' if isinstance(value, bool) else 'a number'} ({json.dumps(value)[:20]})"
    return {str: "a string", list: "a list", dict: "an object"}[type(value)]
