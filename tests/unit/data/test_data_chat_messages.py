"""JSON records to the messages that templates receive: as servers read a request, and what they would refuse."""

import json

import pytest

from megatron_qad.data.bad_document import BadDocument
from megatron_qad.data.chat_messages import parse_chat

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Yes."}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
SCHEMA = {"name": "f", "parameters": {"type": "object", "properties": {}}}


def text_part(text, **others):
    return {"type": "text", "text": text} | others


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "user", "content": None}, {"role": "user", "content": ""}),
        ({"role": "system"}, {"role": "system", "content": ""}),
        ({"role": "tool", "content": []}, {"role": "tool", "content": ""}),
        ({"role": "user", "content": ["a"]}, {"role": "user", "content": [text_part("a")]}),
        (
            {"role": "tool", "content": [text_part("a", image_url=None), {"type": "input_text", "text": "b"}]},
            {"role": "tool", "content": [text_part("a"), text_part("b")]},
        ),
        (
            {
                "role": "assistant",
                "content": [{"type": "output_text", "text": "a"}, {"type": "refusal", "refusal": "b"}],
            },
            {"role": "assistant", "content": [text_part("a"), text_part("b")]},
        ),
        (ANSWER | {"tool_calls": None, "name": None, "reasoning_content": None, "images": []}, ANSWER),
        (ANSWER | {"tool_calls": [], "function_call": None}, ANSWER),
        (ANSWER | {"tool_calls": "", "function_call": {"name": None, "arguments": None}}, ANSWER),
        (ANSWER | {"content": ""}, ANSWER | {"content": ""}),
        (
            {"role": "assistant", "content": None, "reasoning_content": "hm"},
            {"role": "assistant", "content": "", "reasoning_content": "hm", "reasoning": "hm"},
        ),
        (ANSWER | {"reasoning": "hm"}, ANSWER | {"reasoning_content": "hm", "reasoning": "hm"}),
        (ANSWER | {"reasoning_content": ""}, ANSWER | {"reasoning_content": "", "reasoning": ""}),
        ({"role": "function", "name": "f", "content": "4"}, {"role": "tool", "name": "f", "content": "4"}),
    ],
)
def test_messages_as_servers_read_them(message, expected):
    chat = parse_chat({"messages": [message, ANSWER]})
    assert chat.messages[0] == expected


@pytest.mark.parametrize(
    "calls",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [{"type": None, "function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"tool_calls": [{"name": "f", "arguments": {"a": 1}}]},
        {"tool_calls": json.dumps([CALL])},
        {"function_call": {"name": "f", "arguments": '{"a": 1}'}, "tool_calls": None},
    ],
)
def test_tool_calls_of_every_format(calls):
    [message] = parse_chat({"messages": [{"role": "assistant", "content": None} | calls]}).messages
    assert message == {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize("arguments", [None, "", "null", "{}", {}])
def test_calls_without_arguments(arguments):
    call = {"id": "c1", "function": {"name": "f", "arguments": arguments}}
    [message] = parse_chat({"messages": [{"role": "assistant", "tool_calls": [call]}]}).messages
    expected = {"type": "function", "id": "c1", "function": {"name": "f", "arguments": {}}}
    assert message["tool_calls"] == [expected]


@pytest.mark.parametrize(
    ("keys", "tools"),
    [
        ({}, None),
        ({"tools": None}, None),
        ({"tools": []}, None),
        ({"tools": "[]"}, None),
        ({"tools": None, "functions": []}, None),
        ({"tools": [SCHEMA]}, [SCHEMA]),
        ({"tools": json.dumps([SCHEMA])}, [SCHEMA]),
        ({"functions": [SCHEMA]}, [{"type": "function", "function": SCHEMA}]),
    ],
)
def test_tools_of_every_format(keys, tools):
    assert parse_chat({"messages": [USER, ANSWER]} | keys).tools == tools


def test_truncation_concerns_a_last_message_that_counts():
    chats = ([USER, ANSWER], [USER, ANSWER, USER], [USER, ANSWER, USER, ANSWER | {"weight": 0}])
    truncated = [parse_chat({"messages": messages, "finish": "length"}).is_truncated for messages in chats]
    assert truncated == [True, False, False]
    assert not parse_chat({"messages": [USER, ANSWER], "finish": "eos"}).is_truncated


def test_records_are_not_changed():
    record = {"messages": [USER | {"name": None}, {"role": "assistant", "tool_calls": [CALL]}], "documents": None}
    before = json.dumps(record)
    parse_chat(record)
    assert json.dumps(record) == before


NOTHING = r"messages\[0\] \(assistant\): has neither content nor tool calls nor reasoning"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "assistant"}, NOTHING),
        ({"role": "assistant", "content": None}, NOTHING),
        ({"role": "assistant", "content": [], "tool_calls": []}, NOTHING),
        ({"role": "assistant", "content": None, "reasoning_content": ""}, NOTHING),
        ({"content": "a"}, r"messages\[0\]: 'role' is null or absent"),
        ({"role": None, "content": "a"}, "'role' is null or absent"),
        ({"role": "", "content": "a"}, "'role' is a string, expected"),
        ({"role": 3, "content": "a"}, r"'role' is a number \(3\)"),
        ({"role": ["user"], "content": "a"}, "'role' is a list"),
        ({"role": "user", "content": 3}, r"messages\[0\] \(user\): 'content' is a number \(3\)"),
        ({"role": "system", "content": True}, r"'content' is a boolean \(true\)"),
        ({"role": "tool", "content": {"temperature": 4}}, "'content' is an object"),
        ({"role": "user", "content": [1]}, r"content\[0\] is a number \(1\), expected a text part"),
        ({"role": "user", "content": [None]}, r"content\[0\] is null"),
        ({"role": "user", "content": [{"text": "a"}]}, r"content\[0\] has the type 'None'; only text"),
        (
            {"role": "user", "content": [text_part("a"), {"type": "image_url"}]},
            r"content\[1\] has the type 'image_url'",
        ),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "'input_audio'; only text can be used, not images"),
        ({"role": "user", "content": [{"type": ["text"]}]}, "only text can be used"),
        ({"role": "user", "content": [text_part(None)]}, r"content\[0\]: 'text' is null, expected a string"),
        (ANSWER | {"name": 3}, r"'name' is a number \(3\), expected a string"),
        (ANSWER | {"reasoning_content": ["a"]}, "'reasoning_content' is a list, expected a string"),
        (ANSWER | {"weight": 0.5}, "'weight' is 0.5, expected 0 or 1"),
        (USER | {"tool_calls": [CALL]}, "which only a message of the assistant can have"),
        (ANSWER | {"tool_calls": CALL}, "'tool_calls' is an object, expected a list"),
        (ANSWER | {"tool_calls": "f()"}, "'tool_calls' is text that is not JSON"),
        (ANSWER | {"tool_calls": '"f"'}, "'tool_calls' is a string, expected a list"),
        (ANSWER | {"tool_calls": [CALL], "function_call": {"name": "f"}}, "has both 'tool_calls' and 'function_call'"),
        (ANSWER | {"tool_calls": ["f"]}, r"tool_calls\[0\] is a string, expected an object"),
        (ANSWER | {"tool_calls": [CALL, {}]}, r"tool_calls\[1\] has no 'function' with a 'name'"),
        (ANSWER | {"tool_calls": [{"function": {"name": None}}]}, "has no 'function' with a 'name'"),
        (ANSWER | {"function_call": "f"}, "'function_call' is a string, expected an object"),
        (ANSWER | {"function_call": {"name": "f", "arguments": "{"}}, "the arguments of 'f' is not JSON"),
        (ANSWER | {"function_call": {"name": "f", "arguments": "[" * 100000}}, "the arguments of 'f' is not JSON"),
        (ANSWER | {"function_call": {"name": "f", "arguments": "[1]"}}, "the arguments of 'f' are a list"),
        (ANSWER | {"function_call": {"name": "f", "arguments": 3}}, r"the arguments of 'f' are a number \(3\)"),
    ],
)
def test_messages_that_no_server_could_render(message, reason):
    with pytest.raises(BadDocument, match=reason):
        parse_chat({"messages": [message, USER, ANSWER]})


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": None}, "'messages' is not a non-empty list"),
        ({"messages": []}, "'messages' is not a non-empty list"),
        ({"messages": {"role": "user"}}, "'messages' is not a non-empty list"),
        ({"messages": [USER, None]}, "'messages' is not a non-empty list of objects"),
        ({"messages": [USER]}, "no message has the role 'assistant', .* its roles are 'user'"),
        ({"messages": [{"role": "gpt", "content": "a"}]}, "its roles are 'gpt'"),
        ({"messages": [ANSWER | {"weight": 0}]}, "no message has the role 'assistant' and a weight other than 0"),
        ({"tools": {"name": "f"}}, "'tools' is an object, expected a list of objects"),
        ({"tools": ["f"]}, "'tools' is a list, expected a list of objects"),
        ({"tools": "f"}, "'tools' is text that is not JSON"),
        ({"tools": "3"}, r"'tools' is a number \(3\)"),
        ({"tools": [SCHEMA], "functions": [SCHEMA]}, "has both 'tools' and 'functions'"),
        ({"documents": ["a"]}, "'documents' is a list, expected a list of objects"),
        ({"chat_template_kwargs": {"messages": []}}, "'chat_template_kwargs' is not an object without the keys"),
        ({"chat_template_kwargs": 3}, "'chat_template_kwargs' is not an object"),
    ],
)
def test_records_that_no_server_could_render(record, reason):
    with pytest.raises(BadDocument, match=reason):
        parse_chat({"messages": [USER, ANSWER]} | record)
