"""Tokenizers for data preparation: Hugging Face directories and sentencepiece models behind one interface.

Nothing is downloaded, and no code from a tokenizer's directory is run. Not supported: tiktoken, BERT word pieces.
"""

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from megatron_qad.data import long_texts
from megatron_qad.data.bad_document import BadDocument, failures_are_bad_documents
from megatron_qad.data.chat import encode_chat
from megatron_qad.data.chat_messages import Chat
from megatron_qad.data.chat_template import ChatTemplate
from megatron_qad.data.images.placeholders import encode_literally
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.local_models import check_json_files
from megatron_qad.engine.run_directory import manifest

# The files of a Hugging Face tokenizer, which determine how text becomes ids.
_HF_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "added_tokens.json")
"""The files that map pieces to ids. Settings and templates may differ: they change how text is split, not the meaning
of ids."""

PROBE = "  Hello,  World!\n\n\tdef f(x1):  return 3.14159  # don't 123456 \u00e9t\u00e9 \u6570 \U0001f600\u00a0 ABCdef"
"""A text whose ids tell how a tokenizer cuts text: spaces, lines, digits, capitals, scripts, four-byte characters."""


def files_sha256(files: Iterable[Path]) -> dict[str, str]:
    """Return {file name: SHA-256 of its bytes}."""
    return {file.name: manifest.sum_of(file)[1] for file in files}


class DataTokenizer:
    """Base class of tokenizers. Subclasses set the attributes below.

    Attributes:
        name: last part of the path given by the user.
        kind: "huggingface" or "sentencepiece".
        files: the files that define it.
        vocab: {piece: id}, added tokens included.
        vocab_size: ids are 0 .. vocab_size - 1.
        eod: id that ends each document (the tokenizer's EOS, as Megatron's tokenizers have it).
        bos, unk: ids or None.
        special: ids of special tokens, including ``eod``.
    """

    name: str
    kind: str
    files: list[Path]
    vocab: dict[str, int]
    vocab_size: int
    eod: int
    bos: int | None
    unk: int | None
    special: frozenset[int]

    def encode(self, text: str) -> list[int] | array:
        """Return the ids of a plain document without EOD; BOS comes first if the tokenizer adds it.

        They are an ``array("i")`` if the text is long and was encoded in pieces (``long_texts``).

        Raises:
            BadDocument: the tokenizer cannot encode the text.
        """
        raise NotImplementedError

    def encode_chat(self, chat: Chat, multi_turn: str = "each") -> list[tuple[array, bytearray]]:
        """Return the ids and loss masks of a conversation's documents, without EOD; see ``chat.encode_chat``."""
        raise NotImplementedError

    def encode_literally(self, text: str, token: str) -> list[int] | array:
        """Return ``encode(text)`` in which a special ``token`` that the text contains becomes ordinary tokens."""
        return self.encode(text)

    def vocab_sha256(self) -> str:
        """Return a hash of the map piece -> id, which does not depend on how the files were written."""
        pieces = json.dumps(sorted((id_, piece) for piece, id_ in self.vocab.items()), ensure_ascii=True)
        return hashlib.sha256(pieces.encode("ascii")).hexdigest()

    def probe_sha256(self) -> str:
        """Return a hash of the ids of ``PROBE`` without BOS: equal for tokenizers that cut text in the same way.

        Empty if the tokenizer cannot encode it."""
        try:
            ids = self.encode(PROBE)
        except QADError:
            return ""
        return hashlib.sha256(json.dumps(ids[1:] if ids[:1] == [self.bos] else ids).encode("ascii")).hexdigest()

    def files_sha256(self) -> dict[str, str]:
        """Return {file name: SHA-256 of its bytes} of the tokenizer's files."""
        return files_sha256(self.files)


class HFTokenizer(DataTokenizer):
    """Tokenizer of a Hugging Face directory, loaded with ``AutoTokenizer``."""

    kind = "huggingface"

    def __init__(self, directory: Path):
        from transformers import AutoTokenizer

        check_json_files(directory)
        try:
            # The tokenizers library raises plain Exception for most damage, and panics.
            with failures_are_bad_documents("transformers cannot read it"):
                self.hf = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        except BadDocument as error:
            raise QADError(
                f"--tokenizer {directory}: {error}. Expected a directory with tokenizer.json and tokenizer_config.json "
                "that needs no remote code."
            ) from error
        if self.hf.eos_token_id is None:
            raise QADError(
                f"--tokenizer {directory} has no EOS token, which must end each document. Set eos_token in its "
                "tokenizer_config.json."
            )
        self.name = directory.resolve().name
        self.files = [f for pattern in _HF_FILES for f in sorted(directory.glob(pattern)) if f.is_file()]
        self.vocab = self.hf.get_vocab()
        # Ids may have gaps; the model needs a row for the largest id.
        self.vocab_size = max(self.vocab.values()) + 1
        self.eod, self.bos, self.unk = self.hf.eos_token_id, self.hf.bos_token_id, self.hf.unk_token_id
        added = {id_ for id_, token in self.hf.added_tokens_decoder.items() if token.special}
        self.special = frozenset(added | set(self.hf.all_special_ids))
        self._templates: dict[tuple[str, str | None], ChatTemplate] = {}

    def encode(self, text: str) -> list[int] | array:
        with failures_are_bad_documents("the tokenizer rejected the text"):
            if len(text) <= 2 * long_texts.PIECE_CHARS:
                return list(self.hf(text, verbose=False)["input_ids"])
            if not self.hf.is_fast:
                raise BadDocument(
                    f"has {len(text)} characters, more than the {2 * long_texts.PIECE_CHARS} that {self.name} can "
                    "encode: it is not a fast tokenizer (one with character offsets). Save it with a tokenizer.json"
                )
            before, after = self._added_around("a")
            return array("i", before) + long_texts.encode_in_pieces(text, self._encode_piece) + array("i", after)

    def encode_literally(self, text: str, token: str) -> list[int] | array:
        if token not in text:
            return self.encode(text)
        before, after = self._added_around("a")
        return encode_literally(text, token, self.encode, (len(before), len(after)))

    def _encode_piece(self, text: str) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        encoded = self.hf(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts, ends = zip(*encoded["offset_mapping"], strict=True) if encoded["input_ids"] else ((), ())
        return encoded["input_ids"], starts, ends

    def _added_around(self, text: str) -> tuple[list[int], list[int]]:
        """Return the special ids that the tokenizer adds before and after a text."""
        ids = list(self.hf(text)["input_ids"])
        bare = list(self.hf(text, add_special_tokens=False)["input_ids"])
        start = next(i for i in range(len(ids)) if ids[i : i + len(bare)] == bare)
        return ids[:start], ids[start + len(bare) :]

    def encode_chat(self, chat: Chat, multi_turn: str = "each") -> list[tuple[array, bytearray]]:
        if not self.hf.chat_template:
            raise QADError(
                f"The input has chat messages, but the tokenizer {self.name} has no chat template. Add "
                "chat_template.jinja to its directory, or use plain text."
            )
        if not self.hf.is_fast:
            raise QADError(
                f"Chat messages need a fast tokenizer (one with character offsets); {self.name} is a "
                f"{type(self.hf).__name__}. Save it with a tokenizer.json."
            )
        return encode_chat(self.hf, self._template(chat), chat, multi_turn)

    def _template(self, chat: Chat) -> ChatTemplate:
        """Return the template that transformers and servers use: "tool_use" for chats with tools, if there is one."""
        templates = self.hf.chat_template
        templates = templates if isinstance(templates, dict) else {"default": templates}
        name = "tool_use" if chat.tools and "tool_use" in templates else "default"
        source = templates.get(name)
        if not isinstance(source, str):
            raise QADError(
                f"--tokenizer {self.name}: expected a chat template that is text and is named 'default', found "
                f"{', '.join(f'{key!r} ({type(value).__name__})' for key, value in templates.items())}. Name one "
                "'default', or save it as chat_template.jinja."
            )
        image_token = None if chat.images is None else chat.images.settings.image_token
        if (name, image_token) not in self._templates:
            owner = f"The chat template {name!r} of --tokenizer {self.name}"
            template = ChatTemplate(source, self.hf.special_tokens_map, owner, image_token=image_token)
            self._templates[name, image_token] = template
        return self._templates[name, image_token]


class SentencePieceTokenizer(DataTokenizer):
    """Tokenizer of a sentencepiece ``.model`` file. It adds no BOS; ``--prepend-bos`` does."""

    kind = "sentencepiece"

    def __init__(self, model_file: Path):
        import sentencepiece

        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        except (OSError, RuntimeError) as error:
            raise QADError(
                f"--tokenizer {model_file}: sentencepiece cannot read it: {error}. Expected a .model file."
            ) from error
        if self.sp.eos_id() < 0:
            raise QADError(
                f"--tokenizer {model_file} has no EOS piece, needed to end documents. Train it with eos_id >= 0."
            )
        self.name = model_file.name
        self.files = [model_file]
        self.vocab_size = self.sp.get_piece_size()
        self.vocab = {self.sp.id_to_piece(i): i for i in range(self.vocab_size)}
        self.eod = self.sp.eos_id()
        self.bos = self.sp.bos_id() if self.sp.bos_id() >= 0 else None
        self.unk = self.sp.unk_id() if self.sp.unk_id() >= 0 else None
        self.special = frozenset({self.eod})

    def encode(self, text: str) -> list[int] | array:
        with failures_are_bad_documents("the tokenizer rejected the text"):
            if len(text) <= 2 * long_texts.PIECE_CHARS:
                return self.sp.encode(text)
            # Shorter pieces: a unigram model sums scores in float32, which breaks ties differently in a long sum.
            return long_texts.encode_in_pieces(text, self._encode_piece, 1 << 15)

    def _encode_piece(self, text: str) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        pieces = self.sp.encode(text, return_type="proto").pieces
        # Offsets are in UTF-8 bytes. Continuation bytes are 10xxxxxx, so the others before an offset are its character.
        is_first = (np.frombuffer(text.encode("utf-8"), dtype=np.uint8) & 0xC0) != 0x80
        characters = np.concatenate(([0], np.cumsum(is_first)))
        return [p.id for p in pieces], characters[[p.begin for p in pieces]], characters[[p.end for p in pieces]]

    def encode_chat(self, chat: Chat, multi_turn: str = "each") -> list[tuple[array, bytearray]]:
        raise QADError(
            f"The input has chat messages, but the sentencepiece model {self.name} has no chat template. Give a "
            "Hugging Face tokenizer directory that has one, or plain text."
        )


def load_tokenizer(path: str | Path) -> DataTokenizer:
    """Load the tokenizer of a Hugging Face directory or a sentencepiece ``.model`` file.

    Raises:
        QADError: the path does not exist, is not a readable tokenizer, or has no EOS.
    """
    path = Path(path)
    if path.is_dir():
        if not any((path / name).is_file() for name in _HF_FILES):
            is_checkpoint = (path / "hf" / "config.json").is_file()
            hint = f" The tokenizer of this checkpoint is in {path / 'hf'}." if is_checkpoint else ""
            raise QADError(f"--tokenizer {path} has no tokenizer file; expected one of {', '.join(_HF_FILES)}.{hint}")
        return HFTokenizer(path)
    if path.is_file():
        if path.name == "tokenizer.json":
            raise QADError(f"--tokenizer {path} is one file of a Hugging Face tokenizer. Give its directory.")
        return SentencePieceTokenizer(path)
    raise QADError(
        f"--tokenizer {path} does not exist. Expected a Hugging Face tokenizer directory or a sentencepiece .model "
        "file; names on the Hub are not downloaded."
    )
