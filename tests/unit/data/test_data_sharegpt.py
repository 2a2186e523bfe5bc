"""ShareGPT records become the messages that they describe."""

import json

import pytest

from megatron_qad.data.bad_document import BadDocument
from megatron_qad.data.records import BadLine, Record
from megatron_qad.data.sharegpt import with_messages
from megatron_qad.data.sources import encode_record


def turns(*pairs):
    return [{"from": speaker, "value": value} for speaker, value in pairs]


def test_same_tokens_as_messages(hf_tokenizer):
    share = {
        "conversations": turns(("human", "2+2?"), ("gpt", "4")),
        "system": "Be brief.",
        "id": "x",
        "messages": None,
    }
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
    ]
    found, expected = (
        encode_record(Record("f", 1, True, json.dumps(record).encode()), hf_tokenizer)
        for record in (share, {"messages": messages})
    )
    assert found == expected and any(found[0].mask)


def test_roles_and_calls():
    call = {"name": "add", "arguments": {"a": 2}}
    record = with_messages(
        {
            "conversations": [
                *turns(("system", "s"), ("human", "q"), ("function_call", json.dumps(call)), ("observation", "4")),
                {"from": "gpt", "value": "four", "weight": 0},
            ],
            "system": "not used: there is one",
            "tools": "",
        }
    )
    assert record["messages"] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "four", "weight": 0},
    ]
    assert "tools" not in record
    assert with_messages({"text": "a"}) == {"text": "a"}
    plain = [{"role": "user", "content": "q"}]
    assert with_messages({"conversations": plain})["messages"] == plain


@pytest.mark.parametrize(
    "conversations, reason",
    [
        ([], "'conversations' is not a non-empty list"),
        ("text", "'conversations' is not a non-empty list"),
        (["text"], r"conversations\[0\] is not an object"),
        (turns(("alien", "x")), "'from' is 'alien', expected one of human"),
        (turns((3, "x")), "'from' is '3'"),
        ([{"value": "x"}], "'from' is 'None'"),
        (turns(("function_call", "no json")), "the tool call is not JSON"),
        (turns(("function_call", "3")), "expected a tool call"),
        (turns(("function_call", "[]")), "expected a tool call"),
    ],
)
def test_bad_turns(conversations, reason, hf_tokenizer):
    with pytest.raises(BadDocument, match=reason):
        with_messages({"conversations": conversations})
    data = json.dumps({"conversations": conversations}).encode()
    assert isinstance(encode_record(Record("f", 1, True, data), hf_tokenizer), BadLine)
