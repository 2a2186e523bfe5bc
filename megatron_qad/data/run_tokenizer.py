"""Check that a run's data was made with the run's tokenizer.

That is the tokenizer of ``--tokenizer-model``, or else the one in ``hf/`` of the student's or the teacher's checkpoint.
Ids must mean the same pieces, or the data is refused. If the tokenizer cuts text differently (a Hugging Face tokenizer
and a sentencepiece model of the same vocabulary, another normalizer), a warning says so: a served model would read
other token sequences than it was trained on. File hashes are compared first; a tokenizer is loaded only if they differ.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from megatron_qad.data.metadata import DataMetadata
from megatron_qad.data.tokenizer import VOCABULARY_FILES, DataTokenizer, files_sha256, load_tokenizer
from megatron_qad.engine.errors import QADError


class TokenizerUnreadableError(QADError):
    """The run's tokenizer is needed and cannot be loaded."""


@dataclass
class RunTokenizer:
    """The tokenizer of a run: a Hugging Face directory or a sentencepiece ``.model`` file."""

    path: Path
    name: str
    """Name for messages: the flag, or the checkpoint's directory."""
    _loaded: dict[Path, DataTokenizer] = field(default_factory=dict)
    """The tokenizers loaded so far, by path."""

    @classmethod
    def from_checkpoints(cls, args, checkpoints: Iterable[str | None]) -> "RunTokenizer | None":
        """Return the run's tokenizer, or None if neither the flags nor the checkpoints have one.

        Args:
            args: Megatron's arguments, with ``tokenizer_type`` and ``tokenizer_model``.
            checkpoints: model directories; the first one with a tokenizer is used.
        """
        model = args.tokenizer_model
        if args.tokenizer_type != "NullTokenizer" and model is not None and Path(model).exists():
            return cls(Path(model), f"--tokenizer-model {model}")
        for checkpoint in checkpoints:
            hf = Path(checkpoint or "") / "hf"
            if checkpoint and any((hf / name).is_file() for name in VOCABULARY_FILES):
                return cls(hf, f"the model's tokenizer in {hf}")
        return None

    def check(self, prefix: str, metadata: DataMetadata) -> str | None:
        """Check that the token ids of the data stand for the same pieces in this tokenizer.

        Returns:
            A sentence for the log if this tokenizer cuts text differently, or None.

        Raises:
            QADError: the ids stand for other pieces; with the names of both tokenizers.
        """
        made_with = f"--data-path {prefix} was made with the tokenizer {metadata.tokenizer_name}"
        try:
            if not self._files_match(metadata):
                self._check_pieces(made_with, metadata)
        except TokenizerUnreadableError as error:
            raise QADError(
                f"{made_with}, whose files differ from those of {self.name}, which cannot be loaded to compare the "
                f"ids: {error} Give the run's tokenizer with --tokenizer-type and --tokenizer-model."
            ) from error
        if self._cuts_equally(metadata):
            return None
        return (
            f"{made_with} ({metadata.tokenizer_kind}), and {self.name} cuts text differently, although the ids mean "
            "the same pieces. A served model reads what the latter cuts. Prepare the data with it, or ignore this."
        )

    def load(self, path: Path | None = None) -> DataTokenizer:
        """Return this tokenizer, or that of another path, loaded once.

        Raises:
            TokenizerUnreadableError: it cannot be loaded.
        """
        path = path or self.path
        if path not in self._loaded:
            try:
                self._loaded[path] = load_tokenizer(path)
            except QADError as error:
                raise TokenizerUnreadableError(str(error)) from error
        return self._loaded[path]

    def _check_pieces(self, made_with: str, metadata: DataMetadata) -> None:
        is_piece_model = metadata.tokenizer_kind == "sentencepiece" and self._piece_model.is_file()
        vocabulary = self.load(self._piece_model if is_piece_model else None).vocab_sha256()
        if vocabulary != metadata.vocab_sha256:
            raise QADError(
                f"{made_with} (vocabulary {metadata.vocab_sha256[:12]}), but {self.name} maps the ids to other pieces "
                f"(vocabulary {vocabulary[:12]}). Prepare the data with the model's tokenizer."
            )

    def _cuts_equally(self, metadata: DataMetadata) -> bool:
        """Whether this tokenizer cuts text like that of the data; True also if that cannot be known."""
        kind = "huggingface" if self.path.is_dir() else "sentencepiece"
        made_with = metadata.tokenizer_files_sha256
        current = files_sha256(file for name in made_with if (file := self._file(name)).is_file())
        if kind == metadata.tokenizer_kind and set(current.values()) == set(made_with.values()):
            return True
        expected, is_older = metadata.probe_sha256, not metadata.probe_sha256
        try:
            if is_older and metadata.tokenizer_kind == "sentencepiece" and self._files_match(metadata):
                # This directory contains the piece model that the data was made with.
                expected = self.load(self._piece_model if self.path.is_dir() else None).probe_sha256()
            return not expected or self.load().probe_sha256() == expected
        except TokenizerUnreadableError:  # the ids mean the same pieces, and no more is needed to train
            return True

    @property
    def _piece_model(self) -> Path:
        return self.path / "tokenizer.model"

    def _file(self, name: str) -> Path:
        return self.path / name if self.path.is_dir() else self.path

    def _files_match(self, metadata: DataMetadata) -> bool:
        """Whether the files that map pieces to ids are byte-identical to those that the data was made with."""
        if metadata.tokenizer_kind == "sentencepiece":  # one file, of any name
            return bool(set(self._file_hashes.values()) & set(metadata.tokenizer_files_sha256.values()))
        made_with = {k: v for k, v in metadata.tokenizer_files_sha256.items() if k in VOCABULARY_FILES}
        return bool(made_with) and self._file_hashes == made_with

    @cached_property
    def _file_hashes(self) -> dict[str, str]:
        """{file name: SHA-256} of the files that map pieces to ids."""
        files = [self.path / name for name in VOCABULARY_FILES] if self.path.is_dir() else [self.path]
        return files_sha256(file for file in files if file.is_file())
