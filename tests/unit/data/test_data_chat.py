"""Loss masks of chat data select the assistant's text."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_qad.data.chat import BadDocument, mask_from_spans

CHAT = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "What is a class?"},
    {"role": "assistant", "content": "A class is a template."},
    {"role": "user", "content": "And 日本語?\n\n"},
    {"role": "assistant", "content": "Naïve 日本語 😀\n\nand a tail \n"},
]


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
    ids, mask = tokenizer.encode_chat(CHAT)
    assert counted_runs(tokenizer, ids, mask) == [CHAT[2]["content"] + "<|im_end|>", CHAT[4]["content"] + "<|im_end|>"]
    assert tokenizer.hf.decode(ids, clean_up_tokenization_spaces=False) == tokenizer.hf.apply_chat_template(
        CHAT, tokenize=False
    )


def test_tagged_template_matches_transformers(hf_tagged):
    ids, mask = hf_tagged.encode_chat(CHAT)
    expected = hf_tagged.hf.apply_chat_template(CHAT, return_assistant_tokens_mask=True, return_dict=True)
    assert ids == expected["input_ids"]
    assert mask == expected["assistant_masks"]


def test_answer_that_starts_with_white_space_counts(hf_tagged):
    """With transformers 5.14's own mask, neither this answer nor any later one would count."""
    chat = [*CHAT[:2], {"role": "assistant", "content": "  Two spaces."}, *CHAT[3:]]
    ids, mask = hf_tagged.encode_chat(chat)
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
    untagged, tagged = (t.encode_chat(messages) for t in (hf_tokenizer, hf_tagged))
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
    from megatron_qad.data.tokenizer import load_tokenizer

    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }};{% endfor %}"
    tokenizer = load_tokenizer(make_hf_dir(template, eos="<|endoftext|>"))
    ids, mask = tokenizer.encode_chat([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}])
    assert counted_runs(tokenizer, ids, mask) == ["[assistant] Yes.;"]


def test_template_that_rewrites_earlier_messages_is_rejected(make_hf_dir):
    from megatron_qad.data.tokenizer import load_tokenizer

    # As in reasoning models: the text before </think> is removed from all messages except the last.
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if loop.last else "
        "m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = load_tokenizer(make_hf_dir(template))
    turn = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "hm</think>Yes."}]
    ids, mask = tokenizer.encode_chat(turn)
    assert counted_runs(tokenizer, ids, mask) == ["hm</think>Yes.<|im_end|>"]
    with pytest.raises(BadDocument, match="up to message 1 differently"):
        tokenizer.encode_chat(turn + turn)


def test_generation_prompt_with_think_is_cut_to_the_shared_part(make_hf_dir):
    from megatron_qad.data.tokenizer import load_tokenizer

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
    ids, mask = tokenizer.encode_chat(chat)
    assert counted_runs(tokenizer, ids, mask) == ["</think>Yes.<|im_end|>", "hm</think>So.<|im_end|>"]


def test_generation_prompt_that_differs_from_the_turn_header_is_rejected(make_hf_dir):
    from megatron_qad.data.tokenizer import load_tokenizer

    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    )
    tokenizer = load_tokenizer(make_hf_dir(template))
    with pytest.raises(BadDocument, match="generation prompt before message 2 differs from the rendered message"):
        tokenizer.encode_chat(CHAT)


def test_tool_arguments_as_json_text_render_like_mappings(make_hf_dir):
    from megatron_qad.data.tokenizer import load_tokenizer

    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}("
        "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v | tojson }};{% endfor %}){% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = load_tokenizer(make_hf_dir(template))

    def encoded(*arguments):
        calls = [{"type": "function", "function": {"name": "f", "arguments": a}} for a in arguments]
        answer = {"role": "assistant", "content": "", "tool_calls": calls}
        return tokenizer.encode_chat([{"role": "user", "content": "Hi"}, answer])

    ids, mask = encoded('{"a": 1, "b": "x"}', "")
    assert counted_runs(tokenizer, ids, mask) == ['f(a=1;b="x";)f()<|im_end|>']
    assert (ids, mask) == encoded({"a": 1, "b": "x"}, {})
    with pytest.raises(BadDocument, match="arguments of a call of 'f' are not JSON"):
        encoded('{"a": ')


def test_chat_without_an_assistant_message_is_rejected(hf_tokenizer):
    with pytest.raises(BadDocument, match="no message has the role 'assistant'"):
        hf_tokenizer.encode_chat([{"role": "user", "content": "Hi"}])


def test_error_of_the_template_is_reported(make_hf_dir):
    from megatron_qad.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(make_hf_dir("{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(BadDocument, match="roles must alternate"):
        tokenizer.encode_chat(CHAT)


def test_mask_from_spans_handles_trimmed_and_repeated_offsets():
    # "a \n bé": tokens a, white space trimmed to nothing, b, and two byte tokens of é with the same offsets.
    offsets = [(0, 1), (4, 4), (4, 5), (5, 6), (5, 6)]
    assert mask_from_spans(offsets, [(1, 4)]) == [0, 1, 0, 0, 0]
    assert mask_from_spans(offsets, [(4, 5)]) == [0, 0, 1, 0, 0]
    assert mask_from_spans(offsets, [(0, 1), (5, 6)]) == [1, 0, 0, 1, 1]
