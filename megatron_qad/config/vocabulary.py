"""Checks that teacher and student use the same vocabulary, without which a divergence between them is meaningless."""

from pathlib import Path

from megatron_qad.data.tokenizer import VOCABULARY_FILES, load_tokenizer
from megatron_qad.engine import QADError


def check_same_vocabulary(student: str, student_config: dict, teacher: str, teacher_config: dict) -> None:
    """Check that two checkpoint directories have the same vocabulary.

    Tokenizer files that are equal byte by byte are not parsed. If they differ, the maps from piece to id are compared,
    so that a file that was only rewritten passes. Checkpoints without tokenizer files are compared by size alone.

    Args:
        student, teacher: checkpoint directories made by megatron-qad import.
        student_config, teacher_config: their ``hf/config.json``.

    Raises:
        QADError: ``vocab_size`` or the id of a piece differs.
    """
    student_size, teacher_size = student_config["vocab_size"], teacher_config["vocab_size"]
    if student_size != teacher_size:
        raise QADError(
            f"vocab_size is {teacher_size} in the teacher {teacher} and {student_size} in the student {student}; QAD "
            "compares their distributions over the same tokens. Choose a teacher with the student's vocabulary."
        )
    if Path(student).resolve() == Path(teacher).resolve():
        return
    files = {name: (Path(student) / "hf" / name, Path(teacher) / "hf" / name) for name in VOCABULARY_FILES}
    differ = [
        name for name, (a, b) in files.items() if a.is_file() and b.is_file() and a.read_bytes() != b.read_bytes()
    ]
    only_one = [name for name, (a, b) in files.items() if a.is_file() != b.is_file()]
    both = all(any(pair[i].is_file() for pair in files.values()) for i in (0, 1))
    if not both or not (differ or only_one):
        return
    vocab_a, vocab_b = (load_tokenizer(str(Path(root) / "hf")).vocab for root in (student, teacher))
    if vocab_a != vocab_b:
        piece = min((p for p, _ in vocab_a.items() ^ vocab_b.items()), key=lambda p: vocab_b.get(p, vocab_a.get(p)))
        raise QADError(
            f"the tokenizers of student and teacher differ ({', '.join(differ + only_one)} in {student}/hf and "
            f"{teacher}/hf): the piece {piece!r} has id {vocab_a.get(piece)} in the student and {vocab_b.get(piece)} "
            "in the teacher. Choose a teacher with the student's tokenizer."
        )
