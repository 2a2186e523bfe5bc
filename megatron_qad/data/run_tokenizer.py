"""Check that a run's data was made with the run's tokenizer.

That is the tokenizer of ``--tokenizer-model``, or else the one in ``hf/`` of the student's or the teacher's checkpoint.
File hashes are compared first; a tokenizer is loaded only if they differ.
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
    """The tokenizer of a run: a Hugging Face directory or a sentencepiece ``.model`` file."""

    path: Path
    name: str
    """Name for messages: the flag, or the checkpoint's directory."""
    _vocabularies: dict[Path, str] = field(default_factory=dict)
    """Vocabulary hashes of the tokenizers loaded so far, by path."""

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

    def check(self, prefix: str, metadata: DataMetadata) -> None:
        """Check that the token ids of the data stand for the same pieces in this tokenizer.

        Raises:
            QADError: they do not; with the names of both tokenizers.
        """
        if self._files_match(metadata):
            return
        is_piece_model = metadata.tokenizer_kind == "sentencepiece" and (self.path / "tokenizer.model").is_file()
        path = self.path / "tokenizer.model" if is_piece_model else self.path
        made_with = f"--data-path {prefix} was made with the tokenizer {metadata.tokenizer_name}"
        try:
            if path not in self._vocabularies:
                self._vocabularies[path] = load_tokenizer(path).vocab_sha256()
        except QADError as error:
            raise QADError(
                f"{made_with}, whose files differ from those of {self.name}, which cannot be loaded to compare the "
                f"ids: {error} Give the run's tokenizer with --tokenizer-type and --tokenizer-model."
            ) from error
        vocabulary = self._vocabularies[path]
        if vocabulary != metadata.vocab_sha256:
            raise QADError(
                f"{made_with} (vocabulary {metadata.vocab_sha256[:12]}), but {self.name} maps the ids to other pieces "
                f"(vocabulary {vocabulary[:12]}). Prepare the data with the model's tokenizer."
            )

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
