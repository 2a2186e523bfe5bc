"""Loss masks of chat data select the assistant's text."""

import copy
import json
import time
from functools import partial
from os.path import commonprefix

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_qad.data.bad_document import BadDocument
from megatron_qad.data.chat import mask_from_spans
from megatron_qad.data.chat_messages import parse_chat
from megatron_qad.data.tokenizer import load_tokenizer

CHAT = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "What is a class?"},
    {"role": "assistant", "content": "A class is a template."},
    {"role": "user", "content": "And 日本語?\n\n"},
    {"role": "assistant", "content": "Naïve 日本語 😀\n\nand a tail \n"},
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def encode(tokenizer, messages, **keys):
    """Return the ids and the mask of a chat that is one document."""
    [(ids, mask)] = tokenizer.encode_chat(parse_chat({"messages": messages} | keys))
    return list(ids), list(mask)


def counted_runs(tokenizer, ids, mask):
    """Return the decoded text of each run of tokens that count."""
    runs, run = [], []
    for token, counts in zip([*ids, None], [*mask, 0], strict=True):
        if counts:
            run.append(token)
        elif run:
            runs.append(tokenizer.hf.decode(run, clean_up_tokenization_spaces=False))
            run = []
    return runs


@pytest.mark.parametrize("name", ["hf_tokenizer", "hf_tagged"])
def test_only_assistant_text_and_end_of_turn_count(name, request):
    tokenizer = request.getfixturevalue(name)
    ids, mask = encode(tokenizer, CHAT)
    assert counted_runs(tokenizer, ids, mask) == [CHAT[2]["content"] + "<|im_end|>", CHAT[4]["content"] + "<|im_end|>"]
    assert tokenizer.hf.decode(ids, clean_up_tokenization_spaces=False) == tokenizer.hf.apply_chat_template(
        CHAT, tokenize=False
    )


def test_tagged_template_matches_transformers(hf_tagged):
    ids, mask = encode(hf_tagged, CHAT)
    expected = hf_tagged.hf.apply_chat_template(CHAT, return_assistant_tokens_mask=True, return_dict=True)
    assert ids == expected["input_ids"]
    assert mask == expected["assistant_masks"]


def test_answer_that_starts_with_white_space_counts(hf_tagged):
    """With transformers 5.14's own mask, neither this answer nor any later one would count."""
    chat = [*CHAT[:2], {"role": "assistant", "content": "  Two spaces."}, *CHAT[3:]]
    ids, mask = encode(hf_tagged, chat)
    runs = [run.strip() for run in counted_runs(hf_tagged, ids, mask)]
    assert runs == ["Two spaces.<|im_end|>", CHAT[4]["content"] + "<|im_end|>"]


# Special tokens inside a message would end its turn, which the mask cannot prevent.
_CONTENT = st.text(st.characters(codec="utf-8"), max_size=30).filter(lambda s: "<|" not in s)
_TURNS = st.lists(st.tuples(_CONTENT, _CONTENT), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_TURNS)
def test_tagged_and_untagged_templates_give_the_same_mask(hf_tokenizer, hf_tagged, turns):
    messages = [
        {"role": role, "content": content}
        for pair in turns
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]
    untagged, tagged = (encode(t, messages) for t in (hf_tokenizer, hf_tagged))
    assert untagged == tagged
    ids, mask = untagged
    answers = "".join(answer + "<|im_end|>" for _, answer in turns)
    decoded = hf_tokenizer.hf.decode(
        [i for i, m in zip(ids, mask, strict=True) if m], clean_up_tokenization_spaces=False
    )
    # White space at the start of an answer may share a token with the header's newline; that token counts or does not
    # count as a unit.
    if not any(answer[:1].isspace() for _, answer in turns):
        assert decoded == answers
    else:
        assert "".join(decoded.split()) == "".join(answers.split())


def test_without_a_generation_prompt_the_complete_turn_counts(make_hf_dir):
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }};{% endfor %}"
    tokenizer = load_tokenizer(make_hf_dir(template, eos="<|endoftext|>"))
    ids, mask = encode(tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}])
    assert counted_runs(tokenizer, ids, mask) == ["[assistant] Yes.;"]


def test_generation_prompt_with_think_is_cut_to_the_shared_part(make_hf_dir):
    # As in Nemotron 3 Nano: the prompt starts a thought; a message without a thought is rendered with an empty one.
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and '<think>' not in m.content %}<think></think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    tokenizer = load_tokenizer(make_hf_dir(template))
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "<think>\nhm</think>So."},
    ]
    ids, mask = encode(tokenizer, chat)
    assert counted_runs(tokenizer, ids, mask) == ["</think>Yes.<|im_end|>", "hm</think>So.<|im_end|>"]


def test_generation_prompt_that_differs_from_the_turn_header_is_rejected(make_hf_dir):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    )
    tokenizer = load_tokenizer(make_hf_dir(template))
    with pytest.raises(BadDocument, match=r"generation prompt before messages\[2\] differs from the rendered message"):
        encode(tokenizer, CHAT)


def test_mask_from_spans_handles_trimmed_and_repeated_offsets():
    # "a \n bé": tokens a, white space trimmed to nothing, b, and two byte tokens of é with the same offsets.
    offsets = [(0, 1), (4, 4), (4, 5), (5, 6), (5, 6)]
    assert mask_from_spans(offsets, [(1, 4)]) == [0, 1, 0, 0, 0]
    assert mask_from_spans(offsets, [(4, 5)]) == [0, 0, 1, 0, 0]
    assert mask_from_spans(offsets, [(0, 1), (5, 6)]) == [1, 0, 0, 1, 1]


# Qwen3's rules: a thought is kept if no user speaks later; the last message has one even if it is empty.
QWEN3 = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- set text, thought = m.content, m.reasoning_content or '' %}
    {%- if '</think>' in text %}
        {%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}
        {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- text + (m.tool_calls | tojson if m.tool_calls else '') + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' + ('<think>\\n\\n</think>\\n\\n' if enable_thinking is false else '') }}
{%- endif %}"""
# Earlier thoughts are removed, and the assistant's text is marked.
QWEN3_TAGGED = """\
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}
        {%- generation %}
            {{- (m.content if loop.last else m.content.split('</think>')[-1].lstrip('\\n')) + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}{{ m.content + '<|im_end|>' }}{% endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
# As Nemotron 3 Nano: the generation prompt begins a thought; earlier thoughts become empty ones.
NEMOTRON = """\
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' and not loop.last %}
        {{- '<think></think>' + m.content.split('</think>')[-1].lstrip('\\n') }}
    {%- else %}{{- m.content }}{% endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"""
# As templates that end only the last turn.
EOS_AT_END = """\
{%- for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}
{%- if add_generation_prompt %}{{ '[assistant]' }}{% elif messages[-1].role == 'assistant' %}{{ '<|im_end|>' }}
{%- endif %}"""
REWRITING = {"qwen3": QWEN3, "qwen3_tagged": QWEN3_TAGGED, "nemotron": NEMOTRON, "eos_at_end": EOS_AT_END}


def turns(*pairs):
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


PLAIN = [{"role": "system", "content": "Be brief."}, *turns(("One", "1"), ("Two", "2"), ("Three", "3"))]
THOUGHTS = turns(
    ("One", "<think>\nthe first\n</think>\n\n1"),
    ("Two", "<think>\nthe second\n</think>\n\n2"),
    ("Three", "<think>\nthe third\n</think>\n\n3"),
)


@pytest.fixture
def with_template(hf_tokenizer):
    """``with_template(source)``: the tokenizer with another template."""

    def make(source):
        tokenizer = copy.copy(hf_tokenizer)
        tokenizer.hf, tokenizer._templates = copy.copy(hf_tokenizer.hf), {}
        tokenizer.hf.chat_template = source
        return tokenizer

    return make


def as_text(tokenizer, documents):
    """Return (complete text, text that counts) of each document."""
    decode = partial(tokenizer.hf.decode, clean_up_tokenization_spaces=False)
    return [(decode(ids), "".join(counted_runs(tokenizer, ids, mask))) for ids, mask in documents]


@pytest.mark.parametrize("chat", [PLAIN, THOUGHTS], ids=["plain", "thoughts"])
@pytest.mark.parametrize("name", REWRITING)
def test_each_turn_is_rendered_as_the_server_had_it(with_template, name, chat):
    """Compared with transformers: the prompt of messages[:i], and messages[:i + 1] whose last turn is the one."""
    tokenizer = with_template(REWRITING[name])
    render = partial(tokenizer.hf.apply_chat_template, tokenize=False)
    documents = as_text(tokenizer, tokenizer.encode_chat(parse_chat({"messages": chat})))
    expected = []
    for i, message in enumerate(chat):
        if message["role"] == "assistant":
            text, prompt = render(chat[: i + 1]), render(chat[:i], add_generation_prompt=True)
            start = len(commonprefix([text, prompt]))
            assert start > len(render(chat[:i])) or name == "eos_at_end"
            expected.append((text, text[start:].removesuffix("\n")))
    if (name, chat) == ("qwen3_tagged", PLAIN):  # nothing is rewritten: one document
        expected = [(expected[-1][0], "".join(counted for _, counted in expected))]
    assert documents == expected


def test_turns_whose_rendering_stays_share_a_document(with_template):
    """Qwen3 keeps the thoughts of a turn's tool calls until the user speaks again."""
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    chat = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "reasoning_content": "ask", "tool_calls": [call]},
        {"role": "tool", "content": "4 C"},
        {"role": "assistant", "content": "Cold.", "reasoning_content": "tell"},
        *turns(("Sure?", "Yes.")),
    ]
    tokenizer = with_template(QWEN3)
    first, second = as_text(tokenizer, tokenizer.encode_chat(parse_chat({"messages": chat})))
    assert first == (
        tokenizer.hf.apply_chat_template(chat[:4], tokenize=False),
        f"<think>\nask\n</think>\n\n{json.dumps([call])}<|im_end|><think>\ntell\n</think>\n\nCold.<|im_end|>",
    )
    assert "ask" not in second[0] and second[1] == "<think>\n\n</think>\n\nYes.<|im_end|>"


def test_last_turn_alone(with_template, hf_tokenizer):
    tokenizer = with_template(QWEN3)
    chat = parse_chat({"messages": THOUGHTS})
    [(text, counted)] = as_text(tokenizer, tokenizer.encode_chat(chat, multi_turn="last"))
    assert text == tokenizer.hf.apply_chat_template(THOUGHTS, tokenize=False)
    assert counted == "<think>\nthe third\n</think>\n\n3<|im_end|>"
    [(_, counted)] = as_text(hf_tokenizer, hf_tokenizer.encode_chat(chat, multi_turn="last"))
    assert counted == THOUGHTS[-1]["content"] + "<|im_end|>"


def test_turns_of_weight_0_do_not_count(hf_tokenizer):
    """OpenAI's files for fine-tuning choose turns so."""
    chat = [*CHAT[:2], CHAT[2] | {"weight": 0}, CHAT[3], CHAT[4] | {"weight": 1}]
    assert counted_runs(hf_tokenizer, *encode(hf_tokenizer, chat)) == [CHAT[4]["content"] + "<|im_end|>"]


def test_messages_after_the_last_turn_are_left_out(hf_tokenizer):
    later = [{"role": "user", "content": "Thanks"}]
    assert encode(hf_tokenizer, CHAT + later) == encode(hf_tokenizer, CHAT)


def test_template_variables_of_a_record(with_template):
    """The empty thought is in the server's prompt without thinking, so it does not count."""
    tokenizer = with_template(QWEN3)
    ids, mask = encode(tokenizer, turns(("One", "1")), chat_template_kwargs={"enable_thinking": False})
    assert counted_runs(tokenizer, ids, mask) == ["1<|im_end|>"]


def test_greeting_before_the_first_user(with_template):
    """The template refuses to render a prompt without messages, so the model cannot have written the greeting."""
    chat = [{"role": "assistant", "content": "Welcome!"}, *turns(("One", "1"))]
    for refusal in (  # of no message, and of messages without one of the user
        "{% if messages[0].role == 'system' %}{% endif %}",
        "{% if 'user' not in messages | map(attribute='role') %}{{ raise_exception('no user') }}{% endif %}",
    ):
        refusing = with_template(refusal + CHATML)
        assert counted_runs(refusing, *encode(refusing, chat)) == ["1<|im_end|>"]
        with pytest.raises(BadDocument, match="no token that could count"):
            encode(refusing, chat[:1])
    rendering = with_template(CHATML)
    assert counted_runs(rendering, *encode(rendering, chat)) == ["Welcome!<|im_end|>", "1<|im_end|>"]


def test_greeting_after_a_system_message_of_the_template(with_template):
    """SmolLM2's template adds a system message to a chat, but not to none: it must not become the assistant's text."""
    system = "{% if messages and messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    tokenizer = with_template(system + CHATML)
    chat = [{"role": "assistant", "content": "Welcome!"}, *turns(("One", "1"))]
    assert counted_runs(tokenizer, *encode(tokenizer, chat)) == ["1<|im_end|>"]


# As DeepSeek R1 and Nemotron Super: thoughts are removed from every message, also from the last one.
CUTTING = """\
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' + m.content.split('</think>')[-1] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\nOPEN' }}{% endif %}"""


@pytest.mark.parametrize("opening", ["", "<think>\n"])
@pytest.mark.parametrize("written", ["", "<think>\n"])
def test_thoughts_that_the_template_always_removes(with_template, opening, written):
    """The model wrote them after the generation prompt, so they count."""
    tokenizer = with_template(CUTTING.replace("OPEN", opening))
    chat = turns(("One", f"{written}first</think>1"), ("Two", f"{written}second</think>2"))
    documents = as_text(tokenizer, tokenizer.encode_chat(parse_chat({"messages": chat})))
    shown = opening or written  # the server's prompt has its opening, and the model's text may have one
    prefix = "<|im_start|>user\nOne<|im_end|>\n<|im_start|>assistant\n"
    later = prefix + "1<|im_end|>\n<|im_start|>user\nTwo<|im_end|>\n<|im_start|>assistant\n"
    assert [text for text, _ in documents] == [
        f"{prefix}{shown}first</think>1<|im_end|>\n",
        f"{later}{shown}second</think>2<|im_end|>\n",
    ]
    counted = "" if opening else written
    assert [text for _, text in documents] == [
        f"{counted}first</think>1<|im_end|>",
        f"{counted}second</think>2<|im_end|>",
    ]


@pytest.mark.parametrize("name", ["nemotron", "nemotron_tagged"])
def test_thoughts_that_the_generation_prompt_opens(with_template, name):
    """generate_data.py and servers return what follows the prompt, without its <think>."""
    tagged = NEMOTRON.replace("{{- m.content }}", "{%- generation %}{{- m.content }}{% endgeneration %}")
    tokenizer = with_template(tagged if name == "nemotron_tagged" else NEMOTRON)
    chat = turns(("One", "first\n</think>\n\n1"), ("Two", "second\n</think>\n\n2"))
    documents = as_text(tokenizer, tokenizer.encode_chat(parse_chat({"messages": chat})))
    render = partial(tokenizer.hf.apply_chat_template, tokenize=False, add_generation_prompt=True)
    for i, (text, counted) in zip((1, 3), documents, strict=True):
        assert text == render(chat[:i]) + chat[i]["content"] + "<|im_end|>\n"
        assert counted.removesuffix("<|im_end|>") == chat[i]["content"]


OPENING = """\
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}{{- 'OPEN' }}SHOWN{% else %}{{- m.content + '<|im_end|>' }}{% endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\nOPEN' }}{% endif %}"""


@pytest.mark.parametrize("is_tagged", [False, True])
@pytest.mark.parametrize(
    ("opening", "content", "counted"),
    [
        ("<think>\n\n", "<think>\nhm\n</think>\n\n1", "hm\n</think>\n\n1"),
        ("<think>\n\n", "hm\n</think>\n\n1", "hm\n</think>\n\n1"),
        ("<think></think>", "<think>\n\n</think>\n\n1", "1"),
        ("<think></think>", "<think>\nhm\n</think>\n\n1", "<think>\nhm\n</think>\n\n1"),
    ],
)
def test_thought_that_the_prompt_and_the_message_open(with_template, opening, content, counted, is_tagged):
    """Nemotron Nano 2 puts its opening before the last message as well; the tag is there once on servers."""
    shown = "{{ m.content + '<|im_end|>' }}"
    shown = "{% generation %}" + shown + "{% endgeneration %}" if is_tagged else shown
    tokenizer = with_template(OPENING.replace("SHOWN", shown).replace("OPEN", opening))
    prompt = "<|im_start|>user\nOne<|im_end|>\n<|im_start|>assistant\n" + opening
    documents = as_text(tokenizer, tokenizer.encode_chat(parse_chat({"messages": turns(("One", content))})))
    assert documents == [(f"{prompt}{counted}<|im_end|>\n", f"{counted}<|im_end|>")]


@pytest.mark.parametrize(
    ("opening", "content", "counted"),
    [
        ("", "<think>\n\n</think>\n\n1", "<think>\n\n</think>\n\n1"),
        ("<think>\n", "<think>\n\n</think>\n\n1", "\n</think>\n\n1"),
        ("<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n1", "1"),
        ("<think>\n\n</think>\n\n", "1", "1"),
    ],
)
def test_empty_thoughts_of_a_template_that_removes_all(with_template, opening, content, counted):
    """The text is the server's prompt, which has a closed thought if thinking is off, and what the model wrote."""
    tokenizer = with_template(CUTTING.replace("OPEN", opening).replace("[-1]", "[-1].lstrip()"))
    prompt = "<|im_start|>user\nOne<|im_end|>\n<|im_start|>assistant\n" + opening
    documents = as_text(tokenizer, tokenizer.encode_chat(parse_chat({"messages": turns(("One", content))})))
    assert documents == [(f"{prompt}{counted}<|im_end|>\n", f"{counted}<|im_end|>")]


def test_tags_in_the_middle_of_an_answer(with_template):
    """Qwen3's template takes the text between them for a thought and drops the text before it."""
    tokenizer = with_template(QWEN3)
    answer = "Write <think> and </think> around it."
    [(_, counted)] = as_text(tokenizer, tokenizer.encode_chat(parse_chat({"messages": turns(("How?", answer))})))
    assert counted == f"<think>\n\n</think>\n\n{answer}<|im_end|>"


@pytest.mark.parametrize(("name", "opening"), [("nemotron", ""), ("qwen3", "<think>\n"), ("qwen3_tagged", "<think>\n")])
def test_truncated_thoughts(with_template, name, opening):
    """The template would take the text for an answer, after an empty thought."""
    tokenizer = with_template(REWRITING[name])
    chat = turns(("One", opening + "first, I"))
    ids, mask = encode(tokenizer, chat, finish="length")
    prompt = tokenizer.hf.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert as_text(tokenizer, [(ids, mask)]) == [(prompt + chat[1]["content"], chat[1]["content"])]


@pytest.mark.parametrize(
    ("source", "message", "reason"),
    [
        (CHATML, {"content": "a", "reasoning_content": "hm"}, r"leaves out 'reasoning_content' of messages\[1\]"),
        (CHATML.replace("m.content", "m.role"), {"content": "Yes."}, r"leaves out the content of messages\[1\]"),
        (CHATML.replace("m.content", "m.content[:1]"), {"content": "hm</think>Yes."}, "leaves out"),
        (CUTTING.replace("m.content.", "'</think>'."), {"content": "hm</think>"}, "leaves out the thought before"),
        (CUTTING.replace("m.content.", "(m.content * 2)."), {"content": "hm</think>a"}, "leaves out the thought"),
    ],
)
def test_text_of_the_assistant_that_the_template_leaves_out(with_template, source, message, reason):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant"} | message]
    with pytest.raises(BadDocument, match=reason):
        encode(with_template(source), chat)


def test_special_tokens_in_messages_become_special_tokens(hf_tokenizer):
    """As on servers, which tokenize the rendered text."""
    ids, mask = encode(hf_tokenizer, turns(("a<|im_end|>b\0", "c")))
    end = hf_tokenizer.hf.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == 3 and sum(m for i, m in zip(ids, mask, strict=True) if i == end) == 1
    assert hf_tokenizer.hf.decode(ids).startswith("<|im_start|>user\na<|im_end|>b\0<|im_end|>")


def test_a_long_chat_takes_a_moment(with_template):
    """200 turns are rendered 400 times. The limit of time counts processor time; this one is a tenth of it."""
    tokenizer = with_template(CHATML)
    chat = parse_chat({"messages": turns(*[(f"Question {i}?", f"Answer {i}. " * 10) for i in range(200)])})
    start = time.process_time()
    [(ids, mask)] = tokenizer.encode_chat(chat)
    assert time.process_time() - start < 2
    assert len(counted_runs(tokenizer, ids, mask)) == 200


def test_role_that_the_template_leaves_out_is_a_bad_line(make_hf_dir):
    only = "{% if m.role in ['user', 'assistant'] %}"
    named = CHATML.replace("<|im_start|>{{ m.role }}", only + "<|im_start|>{{ m.role }}")
    named = named.replace("<|im_end|>\n{% endfor %}", "<|im_end|>\n{% endif %}{% endfor %}")
    any_role = named.replace(only, "{% if true %}")
    messages = [{"role": "human", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]
    with pytest.raises(
        BadDocument, match=r"messages\[0\] \(human\): the chat template leaves out messages of this role"
    ):
        load_tokenizer(make_hf_dir(named)).encode_chat(parse_chat({"messages": messages}))
    [(ids, mask)] = load_tokenizer(make_hf_dir(any_role)).encode_chat(parse_chat({"messages": messages}))
    assert 0 < sum(mask) < len(ids)
