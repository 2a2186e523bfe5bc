"""Classes of tokens by their text, and texts of tokens by tokenizers that keep spaces in different ways."""

import pytest
import tokenizers
from tokenizers import decoders, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_qad.engine.errors import QADError
from megatron_qad.evaluation.token_classes import CLASSES, TokenTexts, class_of

TEXT = "the cat saw the cat, 12 cats; a na\u00efve \u6570"
KINDS = {
    "bytes": (pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
    # As in Llama 2: the decoder drops the space of the first token of a text.
    "metaspace": (pre_tokenizers.Metaspace(prepend_scheme="never"), decoders.Metaspace(prepend_scheme="always")),
}


@pytest.fixture(params=KINDS)
def texts(request, tmp_path) -> TokenTexts:
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer, bpe.decoder = KINDS[request.param]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if request.param == "bytes" else []
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([TEXT] * 3, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>").save_pretrained(tmp_path)
    return TokenTexts(tmp_path)


def test_texts_of_tokens_keep_their_spaces(texts):
    ids = texts._tokenizer.encode(TEXT, add_special_tokens=False)
    found = [texts.text(i) for i in ids]
    assert texts.length(TEXT) == len(ids) and texts.decode(ids) == TEXT
    assert " cat" in found and texts.class_of(ids[found.index(" cat")]) == "word start"
    assert texts.class_of(ids[0]) == "word continuation"  # at the beginning, without a space
    assert texts.class_of(texts._tokenizer.bos_token_id) == "special"
    assert {texts.class_of(i) for i in ids} <= set(CLASSES)
    if "\ufffd" not in "".join(found):
        assert "".join(found) == TEXT


def test_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(QADError, match="transformers cannot load it"):
        TokenTexts(tmp_path)
    with pytest.raises(QADError, match="is not a directory"):
        TokenTexts(tmp_path / "none")


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
