"""Chats to documents: token ids and a loss mask that selects the assistant's tokens.

A server renders the messages so far, appends the generation prompt, and the model writes its turn. A document contains
exactly that text. Many templates render an earlier turn as it was written, so that one document serves a whole chat.
Templates of reasoning models (Qwen3, Nemotron) remove the thoughts of earlier turns. Then a chat becomes several
documents, each of which ends with a turn that no later rendering contains.

The turn is located as a character range of the rendered text:

- It begins where the generation prompt ends. The generation prompt of a reasoning model may end in ``<think>`` although
  the rendered message has no thought; the prompt is then cut to the part that both share.
- It ends where the rendering of the messages up to it ends.
- If the template marks the assistant's text with ``{% generation %}``, only marked text counts.

Special tokens in the text of a message become special tokens, as on servers, which tokenize the rendered text at once.

Not supported: slow tokenizers (no character offsets) and sentencepiece models (no chat template).
"""

import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix

from megatron_qad.data.bad_document import BadDocument, failures_are_bad_documents
from megatron_qad.data.chat_messages import Chat, text_of
from megatron_qad.data.chat_template import ChatTemplate, TemplateLimitExceeded
from megatron_qad.data.images.image_parts import ChatImages
from megatron_qad.data.images.placeholders import expand, locate_images

MULTI_TURN = ("each", "last")
"""Which turns of the assistant count, the values of ``--multi-turn``."""
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass
class _Rendering:
    """The text of a document and the character ranges of it that count, half-open and ascending."""

    text: str
    spans: list[tuple[int, int]]
    num_images: int = 0


def encode_chat(
    hf_tokenizer, template: ChatTemplate, chat: Chat, multi_turn: str = "each"
) -> list[tuple[array, bytearray]]:
    """Return the token ids and the loss mask of each document of a conversation, without end-of-document tokens.

    Args:
        hf_tokenizer: a fast transformers tokenizer.
        template: its chat template.
        chat: the conversation. Messages after the last turn that counts are left out.
        multi_turn: "each": every turn of the assistant counts in one document, which has it and everything before it as
            the server had it. "last": only the last turn counts, and there is one document.

    Returns:
        [(ids, mask), ...] in the order of the turns; ids and mask have equal length. mask is 1 where the token covers a
        character that the assistant wrote, else 0.

    Raises:
        BadDocument: the template rejects the messages or exceeds its limits, a turn cannot be located in the rendered
            text, or no token counts.

    Example::

        tokenizer = load_tokenizer("my_model")
        chat = parse_chat({"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]})
        [(ids, mask)] = tokenizer.encode_chat(chat)
        tokenizer.hf.decode([i for i, counts in zip(ids, mask) if counts])  # "4<|im_end|>"
    """
    with template.limit():
        renderings = _renderings(template, chat, multi_turn)
    _check_roles_are_rendered(chat, renderings)
    drop_after_eos = not template.marks_assistant
    encoded = [_encode(hf_tokenizer, r, chat.images, drop_after_eos) for r in renderings]
    documents = [(ids, mask) for ids, mask in encoded if any(mask)]
    if not documents:
        raise BadDocument("the assistant's messages have no token that could count in the loss")
    return documents


def _check_roles_are_rendered(chat: Chat, renderings: Sequence[_Rendering]) -> None:
    """Check that the template renders messages whose role is not one of the usual ones, such as "human".

    A template that compares roles with names leaves the others out without an error, and the answer to a question that
    is not there would count.
    """
    for i, message in enumerate(chat.messages[: chat.assistant_turns()[-1]]):
        content = message["content"]
        parts = [content] if isinstance(content, str) else [text_of(part) for part in content]
        rendered = all(any(part.strip() in r.text for r in renderings) for part in parts)
        if message["role"] not in _ROLES and not rendered:
            raise BadDocument(
                f"messages[{i}] ({message['role'][:20]}): the chat template leaves out messages of this role. Use a "
                "role that it knows, such as 'user'"
            )


def _renderings(template: ChatTemplate, chat: Chat, multi_turn: str) -> list[_Rendering]:
    """Render each turn that counts as the server had it; a turn whose text begins with the one before extends it.

    The number of renderings is twice the number of turns, so the time grows with the square of a chat's length.
    """
    turns = chat.assistant_turns()
    renderings: list[_Rendering] = []
    for i in turns[-1:] if multi_turn == "last" else turns:
        turn = _render_turn(template, chat, i)
        if turn is None:
            continue
        if renderings and turn.text.startswith(renderings[-1].text):
            turn.spans = renderings.pop().spans + turn.spans
        turn.num_images = 0 if chat.images is None else chat.images.count(i)
        renderings.append(turn)
        template.check_length(sum(len(r.text) for r in renderings))
    return renderings


def _render_turn(template: ChatTemplate, chat: Chat, i: int) -> _Rendering | None:
    """Render the messages up to the turn ``chat.messages[i]``, of which the turn counts.

    None: it does not count, because no user or tool speaks before it and the template cannot render that, or begins
    the text in another way than the generation prompt. Such a greeting was not written by the model.
    """
    is_answer = bool({m["role"] for m in chat.messages[:i]} & {"user", "tool"})
    try:
        prompt, _ = template.render(chat, i, prompt=True)
        text, marked = template.render(chat, i + 1)
    except BadDocument as error:
        if isinstance(error, TemplateLimitExceeded) or is_answer:
            raise
        return None
    if chat.is_truncated and i == len(chat.messages) - 1 and _is_open_thought(chat.messages[i], prompt):
        text = prompt + chat.messages[i]["content"]
        return _after_prompt(prompt, text, len(prompt), [(len(prompt), len(text))])
    if not is_answer and not text.startswith(prompt):
        return None
    start = _start_of_turn(template, chat, i, prompt, text)
    lost = [what for what, part in _parts_of_turn(chat.messages[i]) if part.strip() not in text[start:]]
    if set(lost) == {_THOUGHT} or not lost and _loses_empty_thought(chat.messages[i], prompt, text[start:]):
        return _render_with_thought(template, chat, i, prompt)
    if lost:
        raise BadDocument(
            f"the chat template leaves out {lost[0]} of messages[{i}], so the model could not learn it. Use another "
            "template, or write the text as the model writes it into 'content'"
        )
    return _after_prompt(prompt, text, start, marked if template.marks_assistant else [(start, len(text))])


def _is_open_thought(message: dict, prompt: str) -> bool:
    """Whether a truncated message ends within a thought. A template would take it for an answer without a thought."""
    content = message["content"]
    if not isinstance(content, str) or "</think>" in content or message.keys() & {"tool_calls", "reasoning_content"}:
        return False
    return content.lstrip().startswith("<think>") or prompt.rstrip().endswith("<think>")


def _loses_empty_thought(message: dict, prompt: str, turn: str) -> bool:
    """Whether a template removed the empty thought of a message, and the generation prompt does not have it instead."""
    content = message["content"]
    is_there = isinstance(content, str) and _EMPTY_THOUGHT.match(content) is not None
    return is_there and "</think>" not in turn and not prompt.rstrip().endswith("</think>")


def _after_prompt(prompt: str, text: str, start: int, spans: list[tuple[int, int]]) -> _Rendering:
    """Return ``text`` with the spans from ``start``, where it leaves the generation prompt.

    A server's text begins with the whole prompt. If the prompt opens a thought that the text closes only, the content
    is what a server returned, without the prompt's end; if the prompt has a closed thought that the text lacks, the
    template shows it in prompts only. The prompt is then completed. The message's own opening tag or empty thought is
    left out after a prompt that ends with the same.
    """
    end, rest = prompt[start:], text[start:]
    is_closed_by_rest = "<think>" in end and "</think>" in rest and "<think>" not in rest.split("</think>")[0]
    is_closed_by_prompt = end.rstrip().endswith("</think>") and "</think>" not in rest
    if is_closed_by_rest or is_closed_by_prompt:
        start, spans = len(prompt), [(a + len(end), b + len(end)) for a, b in spans if b > start]
    elif not end and (repeated := _repeated_thought(prompt, rest)):
        rest = rest[repeated:]
        spans = [(a - repeated, b - repeated) for a, b in spans if b > start + repeated]
    text = prompt[:start] + rest
    return _Rendering(text, [(max(a, start), b) for a, b in spans if b > start])


def _repeated_thought(prompt: str, turn: str) -> int:
    """Return the length of the opening tag or the empty thought at the start of ``turn`` that ``prompt`` ends with."""
    end = prompt.rstrip()
    pattern = _OPEN_THOUGHT if end.endswith("<think>") else _EMPTY_THOUGHT if end.endswith("</think>") else None
    match = pattern.match(turn) if pattern else None
    return match.end() if match else 0


_OPEN_THOUGHT = re.compile(r"\s*<think>\n?")
_EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\n*")
_THOUGHT = "the thought before </think>"


def _parts_of_turn(message: dict) -> Iterator[tuple[str, str]]:
    """Yield (description, text) of what the model wrote, without tool calls, which templates render in many forms."""
    content = message["content"]
    for part in [content] if isinstance(content, str) else [part["text"] for part in content]:
        *thoughts, answer = part.split("</think>")
        yield from ((_THOUGHT, piece) for thought in thoughts for piece in thought.split("<think>"))
        yield "the content", answer
    yield "'reasoning_content'", message.get("reasoning_content", "")


def _render_with_thought(template: ChatTemplate, chat: Chat, i: int, prompt: str) -> _Rendering:
    """Render a turn whose thought the template removes even from the last message (DeepSeek R1, Nemotron Super).

    The model wrote the content as it is, so it takes the place of a placeholder.
    """
    content = chat.messages[i]["content"]
    content = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
    placeholder = "\ue000placeholder\ue000"  # private-use characters; no template knows them
    turn = chat.messages[i] | {"content": placeholder}
    shown, _ = template.render(replace(chat, messages=[*chat.messages[:i], turn]), i + 1)
    before, *after = shown.split(placeholder)
    if len(after) != 1:
        raise BadDocument(f"the chat template leaves out {_THOUGHT} of messages[{i}]. Use another template")
    text = before + content + after[0]
    start = _start_of_turn(template, chat, i, prompt, text)
    return _after_prompt(prompt, text, start, [(start, len(text))])


def _start_of_turn(template: ChatTemplate, chat: Chat, i: int, prompt: str, text: str) -> int:
    """Return where the turn ``chat.messages[i]`` begins in ``text``, given the generation prompt before it."""
    if text.startswith(prompt):
        return len(prompt)
    shared = len(commonprefix([prompt, text]))
    if template.marks_assistant:
        return shared
    before, _ = template.render(chat, i)
    if not text.startswith(before):
        raise BadDocument(
            f"the chat template renders the messages before messages[{i}] differently when it follows, so its tokens "
            "cannot be located. Use a template with {% generation %}"
        )
    if shared <= len(before):
        raise BadDocument(f"the generation prompt before messages[{i}] differs from the rendered message")
    return shared


def _encode(
    hf_tokenizer, rendering: _Rendering, images: ChatImages | None, drop_after_eos: bool
) -> tuple[array, bytearray]:
    """Return the ids and the mask of a document."""
    pieces, spans = [rendering.text], rendering.spans
    if images is not None:
        pieces, spans = expand(rendering.text, spans, images, rendering.num_images)
    ids, offsets, start = array("i"), [], 0  # a batch may hold millions of ids; a list takes eight times the memory
    for piece in pieces:
        with failures_are_bad_documents("the tokenizer rejected the chat"):
            encoded = hf_tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids.extend(encoded["input_ids"])
        offsets += [(begin + start, end + start) for begin, end in encoded["offset_mapping"]]
        start += len(piece)
    if images is not None:
        num_tiles = [file.num_tiles for file in images.files[: rendering.num_images]]
        if len(located := locate_images(ids, num_tiles, images.settings)) != rendering.num_images:
            raise BadDocument(f"image {len(located)} has no tokens {images.settings.image_token}")
    mask = bytearray(mask_from_spans(offsets, spans))
    if drop_after_eos:
        _mask_after_eos(ids, mask, hf_tokenizer.eos_token_id)
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


def _mask_after_eos(ids: array, mask: bytearray, eos: int) -> None:
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
