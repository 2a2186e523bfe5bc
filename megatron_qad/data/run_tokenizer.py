"""The tokenizer that a run's data must have been made with, and whether it was.

That is the one of ``--tokenizer-model`` or else the one that the student's or the teacher's checkpoint carries in
``hf/``. Hashes of files are compared first; a tokenizer is loaded only where they differ.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from megatron_qad.data.metadata import DataMetadata
from megatron_qad.data.tokenizer import VOCABULARY_FILES, files_sha256, load_tokenizer
from megatron_qad.engine.errors import QADError


@dataclass
class RunTokenizer:
    """A Hugging Face directory or a sentencepiece ``.model`` file."""

    path: Path
    name: str
    """For messages: the flag, or the checkpoint's directory."""
    _vocabularies: dict[Path, str] = field(default_factory=dict)
    """Hashes of what had to be loaded, once for all prefixes of a blend."""

    @classmethod
    def from_checkpoints(cls, args, checkpoints: Iterable[str | None]) -> "RunTokenizer | None":
        """None where neither the flags nor the checkpoints hold a tokenizer.

        Args:
            args: Megatron's, with ``tokenizer_type`` and ``tokenizer_model``.
            checkpoints: directories of the models, the first with a tokenizer wins.
        """
        model = args.tokenizer_model
        if args.tokenizer_type != "NullTokenizer" and model is not None and Path(model).exists():
            return cls(Path(model), f"--tokenizer-model {model}")
        for checkpoint in checkpoints:
            hf = Path(checkpoint or "") / "hf"
            if checkpoint and any((hf / name).is_file() for name in VOCABULARY_FILES):
                return cls(hf, f"the model's tokenizer in {hf}")
        return None

    def check(self, prefix: str, metadata: DataMetadata) -> None:
        """Refuse data whose ids mean other pieces.

        Raises:
            QADError: names the data's tokenizer and the run's.
        """
        if self._has_files_of(metadata):
            return
        is_piece_model = metadata.tokenizer_kind == "sentencepiece" and (self.path / "tokenizer.model").is_file()
        path = self.path / "tokenizer.model" if is_piece_model else self.path
        made_with = f"--data-path {prefix} was made with the tokenizer {metadata.tokenizer_name}"
        try:
            if path not in self._vocabularies:
                self._vocabularies[path] = load_tokenizer(path).vocab_sha256()
        except QADError as error:
            raise QADError(
                f"{made_with}, whose files are not those of {self.name}, and that one cannot be loaded to compare "
                f"their ids: {error} Name the run's tokenizer with --tokenizer-type and --tokenizer-model."
            ) from error
        found = self._vocabularies[path]
        if found != metadata.vocab_sha256:
            raise QADError(
                f"{made_with} (vocabulary {metadata.vocab_sha256[:12]}), but {self.name} maps other pieces to its ids "
                f"(vocabulary {found[:12]}). Prepare the data with the model's tokenizer."
            )

    def _has_files_of(self, metadata: DataMetadata) -> bool:
        """Whether the files that map pieces to ids are the data's, byte by byte."""
        if metadata.tokenizer_kind == "sentencepiece":  # one file, of any name
            return bool(set(self._sums.values()) & set(metadata.tokenizer_files_sha256.values()))
        made_with = {k: v for k, v in metadata.tokenizer_files_sha256.items() if k in VOCABULARY_FILES}
        return bool(made_with) and self._sums == made_with

    @cached_property
    def _sums(self) -> dict[str, str]:
        """{file name: SHA-256} of what maps pieces to ids."""
        files = [self.path / name for name in VOCABULARY_FILES] if self.path.is_dir() else [self.path]
        return files_sha256(file for file in files if file.is_file())
