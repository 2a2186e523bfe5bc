"""Renders chats with a tokenizer's chat template, within limits of time and length.

A template is a program in a language with loops, from the directory of a model. It runs in transformers' sandbox, which
keeps it from files and from Python, and here within limits: what fails for one chat is a bad line, and what fails for
every chat is one error about the template.

How parts of text reach the template follows vLLM: a template that loops over parts receives them, and for any other
template they are joined with newlines. vLLM reads the template's syntax tree to tell the two apart. Here a short chat
is rendered in both forms, which also works for loops inside macros. In roles other than user and assistant the parts
are always joined; vLLM joins those of tools.

How an image reaches the template also follows vLLM. A template that renders image parts receives them; any other
template receives text in which the image tokens of a message come first, each followed by a newline. Image tokens that
LLaVA's files have in the text stay where they are, or become parts if the template renders those.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from megatron_qad.data.bad_document import BadDocument, failures_are_bad_documents
from megatron_qad.data.chat_messages import Chat, text_of
from megatron_qad.data.images.image_parts import IMAGE_PART, split_at_tokens
from megatron_qad.data.time_limit import TimeLimitExceeded, time_limit
from megatron_qad.engine.errors import QADError

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")

_MAX_TIMEOUTS = 5
"""Number of chats in a row after whose timeouts the preparation ends: 10,000 of them would take days."""


class TemplateLimitExceeded(BadDocument):
    """The template used too much time or emitted too much text."""


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the text of the template.
        variables: the tokenizer's special tokens.
        owner: names the template in errors.
        max_seconds: processor time that all renderings of one chat may take.
        max_characters: number of characters that one rendering, and all documents of one chat, may have.
        image_token: text of an image in a rendered chat; None: no chat has images.

    Raises:
        QADError: the template has a syntax error, or exceeds a limit even for a chat of two words.

    Attributes:
        marks_assistant: whether the template marks the assistant's text with ``{% generation %}``.
    """

    def __init__(
        self,
        source: str,
        variables: dict[str, Any],
        owner: str,
        max_seconds: float = 20.0,
        max_characters: int = 50_000_000,
        image_token: str | None = None,
    ):
        from transformers.utils.chat_template_utils import _compile_jinja_template

        self.owner, self.max_seconds, self.max_characters = owner, max_seconds, max_characters
        self.marks_assistant = _GENERATION_TAG.search(source) is not None
        self._variables, self._image_token, self._renders_images = variables, image_token, False
        self._timeouts = 0
        try:
            # Compiling computes constant expressions, so it also needs the limit.
            with self.limit(), failures_are_bad_documents("it cannot be compiled"):
                self._compiled = _compile_jinja_template(source)
            self._forms = {role: self._content_form(role) for role in ("user", "assistant")}
            self._renders_images = image_token is not None and self._finds_images(image_token)
        except BadDocument as error:
            line = getattr(error.__cause__, "lineno", None)
            where = f"{owner}, line {line}," if line else owner
            raise QADError(f"{where} cannot be used for any chat: {error}. Correct the template.") from error

    @contextlib.contextmanager
    def limit(self) -> Iterator[None]:
        """Limit the processor time of a block, which renders one chat.

        Raises:
            BadDocument: the block took more than ``max_seconds``.
            QADError: so did the four blocks before.
        """
        try:
            with time_limit(self.max_seconds):
                yield
            self._timeouts = 0
        except TimeLimitExceeded as error:
            self._timeouts += 1
            reason = f"does not finish within {self.max_seconds:g} seconds of processor time"
            if self._timeouts == _MAX_TIMEOUTS:
                raise QADError(
                    f"{self.owner} {reason} for {_MAX_TIMEOUTS} chats in a row. Correct the template, or give "
                    "--multi-turn last if the chats have hundreds of turns."
                ) from error
            raise TemplateLimitExceeded(f"the chat template {reason}") from error

    def render(self, chat: Chat, end: int, *, prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of ``chat.messages[:end]`` and the character ranges inside of ``{% generation %}``.

        With ``prompt`` the text ends with the generation prompt.

        Raises:
            BadDocument: the template rejects the messages, or emits more than ``max_characters``.
        """
        blocks: list[str] = []
        spans: list[tuple[int, int]] = []
        length = 0
        with failures_are_bad_documents("the chat template rejected the messages"):
            messages = [self._with_content(message) for message in chat.messages[:end]]
            variables = self._variables | chat.template_kwargs
            stream = self._compiled.generate(
                messages=messages,
                tools=chat.tools,
                documents=chat.documents,
                add_generation_prompt=prompt,
                **variables,
            )
            with self._compiled.environment.activate_tracker(blocks, spans):
                for block in stream:
                    blocks.append(block)
                    length += len(block)
                    self.check_length(length)
        return "".join(blocks), spans

    def check_length(self, characters: int) -> None:
        if characters > self.max_characters:
            raise TemplateLimitExceeded(f"the chat template emits more than {self.max_characters:,} characters")

    def _with_content(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return the message with its content in the form that the template takes for its role."""
        loops_over_parts, needs_parts = self._forms.get(message["role"], (False, self._forms["user"][1]))
        content, image = message["content"], self._image_token
        if self._renders_images and message["role"] == "user" and isinstance(content, str) and image in content:
            content = split_at_tokens(content, image)
        has_images = isinstance(content, list) and IMAGE_PART in content
        keeps_parts = self._renders_images and message["role"] == "user" if has_images else loops_over_parts
        if isinstance(content, list) and not keeps_parts:
            text = "\n".join(text_of(part) for part in content if part != IMAGE_PART)
            images = [image] * content.count(IMAGE_PART)
            content = "\n".join([*images, text] if text or not images else images)
        if isinstance(content, str) and needs_parts:
            content = [{"type": "text", "text": content}]
        return message | {"content": content}

    def _content_form(self, role: str) -> tuple[bool, bool]:
        """Return (whether the template renders every part of a list, whether it renders lists only)."""
        self._forms = {"user": (True, False), "assistant": (True, False)}  # content reaches the template unchanged
        texts = ("needle", "thread")
        parts = [{"type": "text", "text": text} for text in texts]
        as_string, one, two = (self._try_to_render(role, content) for content in (texts[0], parts[:1], parts))
        is_printed = "'type'" in one or '"type"' in one
        needs_parts = texts[0] not in as_string and texts[0] in one and not is_printed
        loops_over_parts = (one == as_string or needs_parts) and all(text in two for text in texts)
        return loops_over_parts, needs_parts

    def _finds_images(self, image_token: str) -> bool:
        """Return whether the template writes the image token for a part of the user's content that is an image."""
        texts = [{"type": "text", "text": text} for text in ("needle", "thread")]
        without = self._try_to_render("user", texts)
        self._renders_images = True
        shown = self._try_to_render("user", [texts[0], dict(IMAGE_PART), texts[1]])
        has_texts = all(part["text"] in shown for part in texts)
        return has_texts and shown.count(image_token) == without.count(image_token) + 1

    def _try_to_render(self, role: str, content: str | list[dict]) -> str:
        """Return the text of a chat in which ``role`` has this content, or "" if the template rejects it."""
        chat = [{"role": other, "content": content if other == role else "Hello"} for other in ("user", "assistant")]
        try:
            with self.limit():
                return self.render(Chat(chat), 2)[0]
        except TemplateLimitExceeded:
            raise
        except BadDocument:
            return ""
