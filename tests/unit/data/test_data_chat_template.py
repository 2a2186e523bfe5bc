"""Chat templates: forms of content, failures of templates and tokenizers, limits, named templates."""

import contextlib
import copy
import json
import re
import shutil
import threading
import time

import pytest
import tokenizers

from megatron_qad.data.bad_document import BadDocument, failures_are_bad_documents
from megatron_qad.data.chat import encode_chat
from megatron_qad.data.chat_messages import parse_chat
from megatron_qad.data.chat_template import ChatTemplate
from megatron_qad.data.records import BadLine, Record
from megatron_qad.data.sources import encode_record
from megatron_qad.data.time_limit import TimeLimitExceeded, time_limit
from megatron_qad.data.tokenizer import load_tokenizer
from megatron_qad.engine.errors import QADError

PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\nCONTENT<|im_end|>\n{% endfor %}" + PROMPT
PRINTING = TURN.replace("CONTENT", "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls else '' }}")
PLUS = TURN.replace("CONTENT", "{{ '' + m['content'] + '' }}")
ONLY_STRINGS = TURN.replace("CONTENT", "{{ m.content if m.content is string else '' }}")
PARTS = TURN.replace(
    "CONTENT",
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}",
)
ONLY_PARTS = TURN.replace("CONTENT", "{% for p in m.content %}{{ p.text }}{% endfor %}")
FIRST_PART = TURN.replace("CONTENT", "{{ m.content if m.content is string else m.content[0].text }}")
IN_A_MACRO = (
    "{% macro text(c) %}{% if c is string %}{{ c }}{% else %}{% for p in c %}{{ p.text }}{% endfor %}{% endif %}"
    "{% endmacro %}" + TURN.replace("CONTENT", "{{ text(m.content) }}")
)
ASKED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]


@pytest.fixture
def rendered(hf_tokenizer):
    """``rendered(source, messages)``: the text of a chat."""

    def render(source, messages):
        template = ChatTemplate(source, hf_tokenizer.hf.special_tokens_map, "The template")
        chat = parse_chat({"messages": messages})
        [(ids, _)] = encode_chat(hf_tokenizer.hf, template, chat)
        return hf_tokenizer.hf.decode(ids, clean_up_tokenization_spaces=False)

    return render


@pytest.fixture
def encoded(hf_tokenizer):
    """``encoded(source, messages)``: the result of a JSONL line with this template."""

    def encode(source, messages=ASKED, **keys):
        tokenizer = copy.copy(hf_tokenizer)
        tokenizer.hf, tokenizer._templates = copy.copy(hf_tokenizer.hf), {}
        tokenizer.hf.chat_template = source
        return encode_record(Record("f", 1, True, json.dumps({"messages": messages} | keys).encode()), tokenizer)

    return encode


@pytest.mark.parametrize("source", [PRINTING, PLUS, ONLY_STRINGS, PARTS, ONLY_PARTS, FIRST_PART, IN_A_MACRO])
def test_content_reaches_templates_of_every_kind(rendered, source):
    """Null is empty; parts are text. A template that loops over parts sets its own separator, as with vLLM."""
    between = "" if source in (PARTS, ONLY_PARTS, IN_A_MACRO) else "\n"
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [
        {"role": "system", "content": parts},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": parts},
        {"role": "assistant", "content": parts},
    ]
    calls = json.dumps([call]) if source is PRINTING else ""
    assert rendered(source, messages) == (
        f"<|im_start|>system\none\ntwo<|im_end|>\n<|im_start|>user\none{between}two<|im_end|>\n"
        f"<|im_start|>assistant\n{calls}<|im_end|>\n<|im_start|>tool\none\ntwo<|im_end|>\n"
        f"<|im_start|>assistant\none{between}two<|im_end|>\n"
    )


FAILURES = [
    ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
    ("{{ messages[9].role }}", "UndefinedError"),
    ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ("{{ messages.__class__.__mro__ }}", "SecurityError"),
    ("{{ messages.append(1) }}", "SecurityError"),
    ("{{ range(10 ** 9) | list }}", "OverflowError"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ("{{ 'a' * 10 ** 18 }}", "MemoryError"),
    ("{{ messages[0].content[1:'a'] }}", "TypeError"),
    ("{{ messages | tojson(indent=[]) }}", "TypeError"),
    ("{{ '%d' | format('a') }}", "TypeError"),
    ("{{ [].pop() }}", "IndexError|SecurityError"),
    ("{{ 'a'.encode('ascii').decode('utf-16') }}", "UnicodeDecodeError"),
    ("{{ strftime_now(3) }}", "TypeError"),
]


@pytest.mark.parametrize(("source", "reason"), FAILURES, ids=[source for source, _ in FAILURES])
def test_failures_of_a_template_are_bad_lines(encoded, source, reason):
    bad = encoded(source)
    assert isinstance(bad, BadLine)
    assert bad.reason.startswith("the chat template rejected the messages: ")
    assert any(part in bad.reason for part in reason.split("|")), bad.reason


def test_syntax_errors_are_errors_of_the_template(encoded):
    with pytest.raises(
        QADError, match=r"'default' of --tokenizer \w+, line 2, cannot be used for any chat: .*Expected an"
    ):
        encoded("{# first line #}\n{% for m in %}")
    with pytest.raises(QADError, match="line 1, cannot be used for any chat: .*No filter named 'shout'"):
        encoded("{{ messages | shout }}")


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
BIG = "{% for a in range(99999) %}{{ 'a' * 99999 }}{% endfor %}"
IF_LONG = "{% if messages[0].content == 'long' %}WORK{% endif %}" + PRINTING
LONG = parse_chat({"messages": [{"role": "user", "content": "long"}, ASKED[1]]})


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (ENDLESS, "the chat template does not finish within 0.2 seconds of processor time"),
        ("{% macro f() %}" + ENDLESS + "{% endmacro %}{{ f() }}", "does not finish within 0.2 seconds"),
        ("{{ 7 ** (7 ** (9 if messages else 0)) }}", "does not finish within 0.2 seconds"),
        (BIG, "the chat template emits more than 1,000,000 characters"),
        ("{{ 'a' * (10 ** 8 if messages else 0) }}", "emits more than 1,000,000 characters"),
    ],
)
def test_limits_of_time_and_length(hf_tokenizer, work, reason):
    """Beyond a limit for one chat: a bad line. For every chat: an error about the template."""
    limits = {"max_seconds": 0.2, "max_characters": 1_000_000}
    template = ChatTemplate(IF_LONG.replace("WORK", work), {}, "The template", **limits)
    assert len(encode_chat(hf_tokenizer.hf, template, parse_chat({"messages": ASKED}))) == 1
    start = time.monotonic()
    with pytest.raises(BadDocument, match=reason):
        encode_chat(hf_tokenizer.hf, template, LONG)
    with pytest.raises(QADError, match=f"The template cannot be used for any chat: .*{reason}"):
        ChatTemplate(work, {}, "The template", **limits)
    assert time.monotonic() - start < 10
    assert len(encode_chat(hf_tokenizer.hf, template, parse_chat({"messages": ASKED}))) == 1, "the timer is off again"


def test_compiling_has_the_limit_of_time():
    """jinja computes constants when it compiles."""
    with pytest.raises(QADError, match="The template cannot be used for any chat: .*does not finish within 0.2 sec"):
        ChatTemplate("{{ 7 ** (7 ** 9) }}", {}, "The template", max_seconds=0.2)


def test_repeated_timeouts_end_the_preparation(hf_tokenizer):
    template = ChatTemplate(IF_LONG.replace("WORK", ENDLESS), {}, "The template", max_seconds=0.02)
    short = parse_chat({"messages": ASKED})
    for chat in [LONG] * 4 + [short] + [LONG] * 4:
        with pytest.raises(BadDocument) if chat is LONG else contextlib.nullcontext():
            encode_chat(hf_tokenizer.hf, template, chat)
    with pytest.raises(QADError, match="The template does not finish within 0.02 .* for 5 chats in a row") as caught:
        encode_chat(hf_tokenizer.hf, template, LONG)
    assert not isinstance(caught.value, BadDocument)


def test_documents_of_one_chat_have_a_common_limit(hf_tokenizer):
    """Rewritten turns make the text grow with the square of the turns."""
    source = TURN.replace("CONTENT", "{{ m.content if loop.last or m.role == 'user' else '-' * 100 }}")
    template = ChatTemplate(source, {}, "The template", max_characters=5_000)
    chat = parse_chat({"messages": ASKED * 10})
    with pytest.raises(BadDocument, match="more than 5,000 characters"):
        encode_chat(hf_tokenizer.hf, template, chat)
    assert len(encode_chat(hf_tokenizer.hf, template, chat, "last")) == 1


def test_time_limit_restores_the_signal():
    with pytest.raises(TimeLimitExceeded), time_limit(0.05):
        while True:
            pass
    with time_limit(0.05):
        pass
    until = time.process_time() + 0.2
    while time.process_time() < until:  # a timer that was left on would end the process
        pass


def test_a_thread_has_no_limit():
    results = []

    def work():
        with time_limit(0.01):
            results.append(sum(range(10**6)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [499999500000]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(
    ("model", "pre_tokenizer", "reason"),
    [
        (tokenizers.models.Unigram([("a", 0.0)], None, False), None, "Exception: .*`unk_id` is missing"),
        (
            tokenizers.models.WordLevel({"a": 0}, unk_token="a"),
            tokenizers.pre_tokenizers.FixedLength(0),
            "PanicException: chunk size must be non-zero",
        ),
    ],
)
def test_failures_of_a_tokenizer_are_bad_lines(hf_tokenizer, chat, model, pre_tokenizer, reason):
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(model)
    if pre_tokenizer:
        backend.pre_tokenizer = pre_tokenizer
    tokenizer = copy.copy(hf_tokenizer)
    tokenizer.hf, tokenizer._templates = PreTrainedTokenizerFast(tokenizer_object=backend), {}
    tokenizer.hf.chat_template = PRINTING
    line = {"messages": ASKED} if chat else {"text": "Hi"}
    bad = encode_record(Record("f", 1, True, json.dumps(line).encode()), tokenizer)
    assert isinstance(bad, BadLine)
    what = "chat" if chat else "text"
    assert re.match(f"the tokenizer rejected the {what}: {reason}", bad.reason), bad.reason


def test_surrogates_in_the_text_of_arguments_are_bad_lines(encoded):
    """They are valid Unicode in the record and become surrogates when the arguments are parsed."""
    call = {"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}
    bad = encoded(PRINTING, [{"role": "assistant", "tool_calls": [call]}])
    assert isinstance(bad, BadLine) and "the tokenizer rejected the chat: " in bad.reason


def test_interrupts_are_no_bad_lines():
    for interrupt in (KeyboardInterrupt, SystemExit):
        with pytest.raises(interrupt), failures_are_bad_documents("the template"):
            raise interrupt


def test_named_templates(encoded):
    """A chat with tools uses "tool_use", as in transformers."""
    named = {"default": PRINTING, "tool_use": TURN.replace("CONTENT", "tools {{ m.content }}")}
    tools = [{"type": "function", "function": {"name": "f"}}]
    [plain], [with_tools] = encoded(named), encoded(named, tools=tools)
    assert len(with_tools.ids) > len(plain.ids)
    assert encoded(named, tools=None) == encoded(named, tools=[]) == [plain]
    assert encoded({"default": PRINTING}, tools=tools) == [plain]
    with pytest.raises(QADError, match=r"named 'default', found 'rag' \(str\)"):
        encoded({"rag": PRINTING})
    with pytest.raises(QADError, match=r"found 'default' \(int\)"):
        encoded(3)


def test_template_files(make_hf_dir):
    """chat_template.jinja has priority over tokenizer_config.json; files of named templates belong to the tokenizer."""
    directory = make_hf_dir(PRINTING)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ 'old' }}"}))
    before = load_tokenizer(directory)
    assert before.hf.chat_template == PRINTING
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("{{ 'tools' }}")
    after = load_tokenizer(directory)
    assert after.hf.chat_template == {"default": PRINTING, "tool_use": "{{ 'tools' }}"}
    assert after.files_sha256().keys() - before.files_sha256().keys() == {"tool_use.jinja"}
    shutil.rmtree(directory / "additional_chat_templates")
    (directory / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": PLUS}, {"name": "rag", "template": "{{ documents }}"}]
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    assert load_tokenizer(directory).hf.chat_template["default"] == PLUS


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.jinja", b"\xff"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b'{"model": 3}'),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}'),
        ("tokenizer_config.json", b'{"chat_template": [3]}'),
        ("tokenizer_config.json", b'{"eos_token": 3}'),
    ],
)
def test_damaged_tokenizer_files_are_errors(make_hf_dir, file, content):
    directory = make_hf_dir(PRINTING)
    if file == "tokenizer_config.json":
        (directory / "chat_template.jinja").unlink()
    (directory / file).write_bytes(content)
    with pytest.raises(QADError, match="other.*(cannot read it|has no EOS|expected a JSON object)"):
        load_tokenizer(directory)
