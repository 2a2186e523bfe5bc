"""Classes of tokens by their text, such as digits and beginnings of words."""

import unicodedata
from collections.abc import Iterable
from pathlib import Path

from megatron_qad.data.bad_document import failures_are_bad_documents
from megatron_qad.engine.errors import QADError

CLASSES = (
    *("word start", "word continuation", "other script", "digits", "punctuation", "whitespace"),
    *("special", "mixed", "part of a character"),
)
"""Every token has one. "word start": Latin letters after a space; "word continuation": without one, also the first word
of a line. "other script": letters that are not Latin. "mixed": several kinds in one token, such as ``x1``. "part of a
character": bytes that are not a character alone."""
_REPLACEMENT = "\ufffd"
_NAMES = (("other script", "L"), ("digits", "N"), ("punctuation", "PS"))


def class_of(text: str, *, is_special: bool = False) -> str:
    """Return the class of a token with this text.

    Example:
        >>> class_of(" the"), class_of("ing"), class_of("12"), class_of(");")
        ('word start', 'word continuation', 'digits', 'punctuation')
    """
    if is_special:
        return "special"
    if _REPLACEMENT in text:
        return "part of a character"
    content = text.strip()
    if not content:
        return "whitespace"
    kinds = {_kind(char) for char in content}
    if kinds <= {"latin", "mark"}:
        return "word start" if text[0].isspace() else "word continuation"
    if kinds <= {"other script", "latin", "mark"}:
        return "other script"
    return kinds.pop() if len(kinds) == 1 else "mixed"


def _kind(char: str) -> str:
    category = unicodedata.category(char)
    if category[0] == "M":
        return "mark"
    if category[0] == "L" and "LATIN" in unicodedata.name(char, ""):
        return "latin"
    return next((name for name, first in _NAMES if category[0] in first), "mixed")


class TokenTexts:
    """The texts of token ids, from the tokenizer of a Hugging Face directory.

    Args:
        directory: with the files of the tokenizer. No code from it is run.

    Raises:
        QADError: transformers cannot load it.
    """

    def __init__(self, directory: str | Path):
        from transformers import AutoTokenizer

        if not Path(directory).is_dir():
            raise QADError(f"--tokenizer {directory}: is not a directory. Expected the files of a tokenizer.")
        with failures_are_bad_documents(f"--tokenizer {directory}: transformers cannot load it"):
            self._tokenizer = AutoTokenizer.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        self._special = {*self._tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        # Some tokenizers drop the space of a text's first token, so each token is decoded after another one.
        anchors = self._tokenizer.encode("a", add_special_tokens=False)
        self._anchor = anchors[-1:]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of several tokens."""
        return self._tokenizer.decode(
            list(map(int, ids)), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def text(self, token: int) -> str:
        """Return the text of one token, with its space."""
        before = self.decode(self._anchor)
        both = self.decode([*self._anchor, token])
        return both.removeprefix(before) if both.startswith(before) else self.decode([token])

    def length(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def class_of(self, token: int) -> str:
        return class_of(self.text(token), is_special=int(token) in self._special)
