"""Chat messages -> token ids and a mask of the tokens that the assistant wrote.

The conversation is rendered once by the tokenizer's chat template and tokenized once, as the model sees it. What the
assistant wrote is found as character ranges of the rendered text, in one of two ways:

- the template marks it with ``{% generation %}``: those ranges;
- otherwise by difference: what message i adds to the rendering of the messages before it, opened for generation. A
  reasoning model's template may open with ``<think>`` where the message then has none: what both share is the prompt.

Arguments of tool calls that are JSON text, as OpenAI's interface has them, are parsed first, because templates render
mappings; servers do the same.

Left out: tokenizers without character offsets (the slow ones) and sentencepiece models, which have no chat template.
"""

import json
import re
from collections.abc import Sequence
from os.path import commonprefix

import jinja2

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class BadDocument(Exception):
    """One input record cannot become a document; the message is the reason that the list of bad lines shows."""

    line_offset = 0
    """Lines between the start of the record and the problem."""


def encode_chat(hf_tokenizer, messages: list[dict], tools: list | None = None) -> tuple[list[int], list[int]]:
    """Token ids and loss mask of one conversation, without an end-of-document token.

    Args:
        hf_tokenizer: a fast transformers tokenizer with a chat template.
        messages: ``[{"role": str, "content": ...}, ...]`` as the template takes them.
        tools: JSON schemas that the template renders, or None.

    Returns:
        (ids, mask), equally long; mask is 1 where the token covers a character that the assistant wrote, else 0.

    Raises:
        BadDocument: the template refuses the messages, no message is the assistant's, or the difference method meets a
            template that rewrites earlier messages.
    """
    if not any(isinstance(m, dict) and m.get("role") == "assistant" for m in messages):
        raise BadDocument("no message has the role 'assistant', so no token would count")
    messages = [_with_parsed_arguments(message) for message in messages]
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
        _stop_at_eos(ids, mask, hf_tokenizer.eos_token_id)
    if not any(mask):
        raise BadDocument("the assistant's messages hold no token that could count")
    return ids, mask


def mask_from_spans(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """1 for each token that covers a character inside one of the half-open, ascending character ``spans``.

    Byte-level tokenizers trim white space from their offsets and give several byte tokens of one character the same
    offsets, so a token's reach is from the end of the token before it, or its own start if that is earlier. (What was
    trimmed from a token's end is thereby the next token's.)
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
    """The rendered text; with ``spans`` also the character ranges inside ``{% generation %}``."""
    # apply_chat_template(return_assistant_tokens_mask=True) would map the ranges to tokens itself, but
    # where a range begins with white space, which byte-level offsets leave out, it drops that range and all later ones
    # silently (transformers 5.14). The renderer under it gives the ranges.
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
        raise BadDocument(f"the chat template refused the messages: {type(error).__name__}: {error}") from error
    return (rendered[0], list(ranges[0])) if spans else rendered[0]


def _assistant_spans(hf_tokenizer, template: str, messages, tools, text: str) -> list[tuple[int, int]]:
    """What each assistant message adds to the rendering of those before it, as character ranges of ``text``."""
    spans = []
    for i, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        opened = _render(hf_tokenizer, template, messages[:i], tools, prompt=True)
        through = _render(hf_tokenizer, template, messages[: i + 1], tools)
        if not text.startswith(opened):
            before = _render(hf_tokenizer, template, messages[:i], tools)
            _check_beginning(text, before, f"before message {i}")
            opened = commonprefix([opened, text])
            if len(opened) <= len(before):
                raise BadDocument(f"the chat template opens message {i} otherwise than it renders it")
        _check_beginning(text, through, f"through message {i}")
        if len(opened) > len(through):
            raise BadDocument(f"message {i} renders to nothing after the generation prompt")
        spans.append((len(opened), len(through)))
    return spans


def _check_beginning(text: str, part: str, which: str) -> None:
    if not text.startswith(part):
        raise BadDocument(
            f"the chat template renders the messages {which} differently once later messages follow, so the "
            "assistant's tokens cannot be told apart; a template with {% generation %} can"
        )


def _with_parsed_arguments(message):
    """The message, with mappings for the arguments of tool calls that are JSON text."""
    if not isinstance(message, dict) or not isinstance(message.get("tool_calls"), list):
        return message
    return message | {"tool_calls": [_parsed_call(call) for call in message["tool_calls"]]}


def _parsed_call(call):
    function = call.get("function") if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments or "{}")
    except ValueError as error:
        raise BadDocument(f"the arguments of a call of {function.get('name')!r} are no JSON: {error}") from error
    return call | {"function": function | {"arguments": parsed}}


def _stop_at_eos(ids: list[int], mask: list[int], eos: int) -> None:
    """In each run of counted tokens drop what follows its last EOS: a template may write a newline, a model stops."""
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
