"""Duplicates, near-duplicates and contamination of prepared data."""

import json
import random
import runpy
import sys
from pathlib import Path

import pytest

from megatron_qad.data.overlap import measure_overlap
from megatron_qad.data.prepare import PrepareOptions, prepare_data

TOOL = Path(__file__).resolve().parents[3] / "tools" / "check_overlap.py"


@pytest.fixture(scope="module")
def prepare(tmp_path_factory, hf_dir):
    """``prepare(texts)``: the prefix of these documents."""
    directory = tmp_path_factory.mktemp("overlap")

    def run(texts):
        name = f"d{len(list(directory.glob('*.jsonl')))}"
        file = directory / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prepare_data(PrepareOptions(inputs=[str(file)], tokenizer=str(hf_dir), output=str(directory / name)))
        return str(directory / name)

    return run


def sentences(seed, number=60):
    """Return random words: two of them share no 13-gram."""
    generator = random.Random(seed)
    return " ".join("".join(generator.choices("abcdefghij", k=5)) for _ in range(number))


def changed(text, words):
    """Replace every ``words``-th word."""
    return " ".join("xyzzy" if i % words == 3 else word for i, word in enumerate(text.split()))


def test_duplicates_and_near_duplicates_are_counted(prepare):
    texts = [sentences(i) for i in range(40)]
    similar = texts[3].replace(texts[3].split()[30], "other", 1)  # one word of sixty
    found = measure_overlap([prepare([*texts, texts[0], texts[0], similar, changed(texts[5], 4)])])
    assert (found.training, found.duplicates, found.near_duplicates) == (44, 2, 1)
    # Also over several prefixes.
    found = measure_overlap([prepare(texts[:20]), prepare(texts[:20])])
    assert (found.training, found.duplicates, found.near_duplicates) == (40, 20, 0)


def test_validation_in_training_is_counted(prepare):
    texts = [sentences(i) for i in range(40)]
    half = " ".join(texts[7].split()[:45]) + " " + sentences(100, 15)  # three quarters of a training document
    little = " ".join(texts[8].split()[:20]) + " " + sentences(101, 40)
    fresh = [sentences(200 + i) for i in range(5)]
    found = measure_overlap([prepare(texts)], prepare([texts[2], half, little, *fresh]))
    assert (found.validation, found.in_training, found.near_training, found.contaminated) == (8, 1, 0, 2)
    assert [number for number, _ in found.worst] == [0, 1, 2] and found.worst[0][1] == 1.0
    assert 0.6 < found.worst[1][1] < 0.85 and 0.2 < found.worst[2][1] < 0.45


def test_text_of_a_template_is_no_contamination(prepare):
    """A system prompt that every document has, longer than the rest."""
    system = sentences(999, 80)
    found = measure_overlap(
        [prepare([f"{system} {sentences(i, 40)}" for i in range(20)])],
        prepare([f"{system} {sentences(i, 40)}" for i in range(100, 110)]),
    )
    # Twelve tokens of the template and the first of a document can occur twice by chance.
    assert found.contaminated == 0 and all(share < 0.05 for _, share in found.worst)


def test_short_documents(prepare):
    found = measure_overlap([prepare(["a b", "a b", "c"])], prepare(["c", "d e"]))
    assert (found.duplicates, found.in_training, found.contaminated) == (1, 1, 1)


def test_the_command_line_of_the_overlap(prepare, monkeypatch, capsys):
    training, validation = prepare([sentences(1), sentences(2)]), prepare([sentences(2)])
    monkeypatch.setattr(sys, "argv", [str(TOOL), training, "--validation", validation])
    runpy.run_path(str(TOOL), run_name="__main__")
    text = capsys.readouterr().out
    assert "training: 2 documents, 0 duplicates, 0 near-duplicates" in text
    assert "1 equal a training document" in text and "document 0: 100% of its 13-grams occur in training" in text
