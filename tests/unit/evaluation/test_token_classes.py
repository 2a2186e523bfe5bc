"""Classes of tokens by their text."""

import pytest

from megatron_qad.evaluation.token_classes import CLASSES, class_of


@pytest.mark.parametrize(
    "text, expected",
    [
        (" the", "word start"),
        ("\tthe", "word start"),
        ("ing", "word continuation"),
        ("É", "word continuation"),
        ("e\u0301", "word continuation"),  # with a combining accent
        (" при", "other script"),
        ("数", "other script"),
        ("42", "digits"),
        (" 7", "digits"),
        (");", "punctuation"),
        (" +", "punctuation"),
        ("\n\n", "whitespace"),
        ("  ", "whitespace"),
        ("", "whitespace"),
        ("x1", "mixed"),
        ("'s", "mixed"),
        ("\ufffd", "part of a character"),
        ("\x00", "mixed"),
    ],
)
def test_class_of_a_text(text, expected):
    assert class_of(text) == expected and expected in CLASSES


def test_special_tokens_have_their_own_class():
    assert class_of("<s>", is_special=True) == "special"
