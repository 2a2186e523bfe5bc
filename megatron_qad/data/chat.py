"""Chat messages to token ids and a loss mask that selects the assistant's tokens.

The tokenizer's chat template renders the conversation once, and the text is tokenized once, exactly as the model sees
it. The assistant's text is located as character ranges of the rendered text, in one of two ways:

- If the template marks it with ``{% generation %}``, those ranges are used.
- Otherwise by difference: the text that message i adds to the rendering of the earlier messages plus the generation
  prompt. A reasoning model's generation prompt may end in ``<think>`` although the rendered message has no thought; the
  prompt is then cut to the part that both share.

Tool-call arguments given as JSON text, as in OpenAI's API, are parsed first because templates expect mappings; servers
do the same.

Not supported: slow tokenizers (no character offsets) and sentencepiece models (no chat template).
"""

import json
import re
from collections.abc import Sequence
from os.path import commonprefix

import jinja2

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class BadDocument(Exception):
    """Raised if an input record cannot become a document; the list of bad lines shows the message as the reason."""

    line_offset = 0
    """Number of lines between the start of the record and the problem."""


def encode_chat(hf_tokenizer, messages: list[dict], tools: list | None = None) -> tuple[list[int], list[int]]:
    """Return the token ids and the loss mask of one conversation, without an end-of-document token.

    Args:
        hf_tokenizer: a fast transformers tokenizer with a chat template.
        messages: ``[{"role": str, "content": ...}, ...]`` as the template takes them.
        tools: JSON schemas that the template renders, or None.

    Returns:
        (ids, mask) of equal length; mask is 1 where the token covers a character that the assistant wrote, else 0.

    Raises:
        BadDocument: the template rejects the messages, no message is from the assistant, or the template has no
            ``{% generation %}`` and rewrites earlier messages.

    Example::

        tokenizer = AutoTokenizer.from_pretrained("my_model")
        ids, mask = encode_chat(tokenizer, [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}])
        tokenizer.decode([i for i, counts in zip(ids, mask) if counts])  # "4<|im_end|>"
    """
    if not any(isinstance(m, dict) and m.get("role") == "assistant" for m in messages):
        raise BadDocument("no message has the role 'assistant', so no token would count in the loss")
    messages = [_parse_tool_arguments(message) for message in messages]
    template = hf_tokenizer.get_chat_template(tools=tools)
    tagged = _GENERATION_TAG.search(template) is not None
    if tagged:
        text, spans = _render(hf_tokenizer, template, messages, tools, spans=True)
    else:
        text = _render(hf_tokenizer, template, messages, tools)
        spans = _assistant_spans(hf_tokenizer, template, messages, tools, text)
    encoded = hf_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(encoded["input_ids"])
    mask = mask_from_spans(encoded["offset_mapping"], spans)
    if not tagged:
        _mask_after_eos(ids, mask, hf_tokenizer.eos_token_id)
    if not any(mask):
        raise BadDocument("the assistant's messages have no token that could count in the loss")
    return ids, mask


def mask_from_spans(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Return 1 for each token that covers a character inside one of the half-open, ascending character ``spans``.

    Byte-level tokenizers trim white space from their offsets and give the byte tokens of one character the same
    offsets. A token is therefore taken to start at the end of the previous token, or at its own start if that is
    earlier. (Characters trimmed from a token's end thus belong to the next token.)
    """
    mask, previous_end, current = [], 0, 0
    for start, end in offsets:
        start, end = min(start, previous_end), max(end, previous_end)
        while current < len(spans) and spans[current][1] <= start:
            current += 1
        mask.append(int(current < len(spans) and max(start, spans[current][0]) < min(end, spans[current][1])))
        previous_end = end
    return mask


def _render(hf_tokenizer, template: str, messages, tools, *, prompt: bool = False, spans: bool = False):
    """Return the rendered text; with ``spans`` also the character ranges inside ``{% generation %}``."""
    # apply_chat_template(return_assistant_tokens_mask=True) would map the ranges to tokens itself. But if a range
    # begins with white space, which byte-level offsets omit, it silently drops that range and all later ones
    # (transformers 5.14). The renderer that it calls returns the ranges.
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, ranges = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=spans,
            add_generation_prompt=prompt,
            **hf_tokenizer.special_tokens_map,
        )
    except (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise BadDocument(f"the chat template rejected the messages: {type(error).__name__}: {error}") from error
    return (rendered[0], list(ranges[0])) if spans else rendered[0]


def _assistant_spans(hf_tokenizer, template: str, messages, tools, text: str) -> list[tuple[int, int]]:
    """Return the character range of ``text`` that each assistant message adds to the earlier messages' rendering."""
    spans = []
    for i, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        prompt = _render(hf_tokenizer, template, messages[:i], tools, prompt=True)
        through = _render(hf_tokenizer, template, messages[: i + 1], tools)
        if not text.startswith(prompt):
            before = _render(hf_tokenizer, template, messages[:i], tools)
            _check_prefix(text, before, f"before message {i}")
            prompt = commonprefix([prompt, text])
            if len(prompt) <= len(before):
                raise BadDocument(f"the generation prompt before message {i} differs from the rendered message")
        _check_prefix(text, through, f"up to message {i}")
        if len(prompt) > len(through):
            raise BadDocument(f"message {i} renders to nothing after the generation prompt")
        spans.append((len(prompt), len(through)))
    return spans


def _check_prefix(text: str, part: str, which: str) -> None:
    if not text.startswith(part):
        raise BadDocument(
            f"the chat template renders the messages {which} differently when later messages follow, so the "
            "assistant's tokens cannot be located. Use a template with {% generation %}."
        )


def _parse_tool_arguments(message):
    """Return the message with the JSON text of its tool-call arguments parsed into mappings."""
    if not isinstance(message, dict) or not isinstance(message.get("tool_calls"), list):
        return message
    return message | {"tool_calls": [_parse_call(call) for call in message["tool_calls"]]}


def _parse_call(call):
    function = call.get("function") if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments or "{}")
    except ValueError as error:
        raise BadDocument(f"the arguments of a call of {function.get('name')!r} are not JSON: {error}") from error
    return call | {"function": function | {"arguments": parsed}}


def _mask_after_eos(ids: list[int], mask: list[int], eos: int) -> None:
    """Drop the tokens after the last EOS of each counted run: a template may add a newline, but a model stops there."""
    run_end = len(ids)
    while run_end > 0:
        if not mask[run_end - 1]:
            run_end -= 1
            continue
        start = run_end
        while start > 0 and mask[start - 1]:
            start -= 1
        if eos in ids[start:run_end]:
            last = max(i for i in range(start, run_end) if ids[i] == eos)
            mask[last + 1 : run_end] = [0] * (run_end - last - 1)
        run_end = start
