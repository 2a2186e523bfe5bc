"""Long texts are tokenized in pieces with the ids of one call."""

import pydoc_data.topics
import random
import string
from array import array

import pytest
import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_qad.data import long_texts
from megatron_qad.data.bad_document import BadDocument
from megatron_qad.data.long_texts import encode_in_pieces
from megatron_qad.data.records import Record
from megatron_qad.data.sources import encode_record
from megatron_qad.data.tokenizer import load_tokenizer

ENGLISH = "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
# As in Llama 3: words, up to three digits, punctuation, white space.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
LLAMA3 += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _texts() -> dict[str, str]:
    pick = random.Random(1)
    return {
        "english": ENGLISH[:150_000],
        "without spaces": "".join(c for c in ENGLISH if c.isalpha())[:60_000],
        "one letter": "a" * 50_000,
        "digits": "".join(pick.choices(string.digits, k=50_000)),
        "long white space": "x" + " " * 30_000 + "y " * 10_000,
        "Chinese": "".join(chr(pick.randrange(0x4E00, 0x9FFF)) for _ in range(30_000)),
        "mixed": "".join(pick.choices("\U0001f600e\u0301 \n\u00e9\u200dab", k=30_000)),
        "special tokens": "".join(pick.choices(["<|im_end|>", " word", "\n", "<|im_"], k=10_000)),
    }


@pytest.fixture(scope="module")
def kinds(tmp_path_factory, hf_dir, sp_model):
    """Tokenizers that cut text in each of the common ways: GPT-2, Llama 3 and Qwen (NFC), Mistral, sentencepiece."""
    llama3, mistral = tokenizers.Tokenizer(models.BPE()), tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    llama3.normalizer = normalizers.NFC()
    llama3.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    mistral.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    paths = {"gpt2": hf_dir, "sentencepiece": sp_model}
    for name, tokenizer in (("llama3", llama3), ("mistral", mistral)):
        trainer = trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=alphabet if name == "llama3" else [],
            show_progress=False,
        )
        tokenizer.train_from_iterator([ENGLISH[:100_000]], trainer)
        if name == "mistral":  # one word of the whole text, and BOS and EOS around it
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
            tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
                single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
            )
        paths[name] = tmp_path_factory.mktemp(name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(paths[name])
    return {name: load_tokenizer(path) for name, path in paths.items()}


@pytest.mark.parametrize("text", _texts())
@pytest.mark.parametrize("kind", ["gpt2", "llama3", "mistral", "sentencepiece"])
def test_pieces_have_the_ids_of_one_call(kinds, kind, text, monkeypatch):
    tokenizer, text = kinds[kind], _texts()[text]
    whole = list(tokenizer.encode(text))  # shorter than two pieces
    monkeypatch.setattr(long_texts, "PIECE_CHARS", 4000)
    encode, lengths = tokenizer._encode_piece, []
    monkeypatch.setattr(long_texts, "encode_in_pieces", lambda t, e, *_: encode_in_pieces(t, recorded, 4000, 16_000))

    def recorded(piece):
        lengths.append(len(piece))
        return encode(piece)

    assert list(tokenizer.encode(text)) == whole
    assert max(lengths) <= 16_000 and sum(lengths) <= 3 * len(text), "memory and time are bounded"


def test_english_of_realistic_length(kinds):
    text = (ENGLISH + ENGLISH)[: 2 * long_texts.PIECE_CHARS + 100_000]
    tokenizer = kinds["gpt2"]
    ids = tokenizer.encode(text)
    assert isinstance(ids, array)
    assert list(ids) == tokenizer.hf(text, verbose=False)["input_ids"]
    sp = kinds["sentencepiece"]
    assert list(sp.encode(text)) == sp.sp.encode(text)
    document = encode_record(Record("f", 1, False, text.encode()), tokenizer)[0]
    assert document.ids[:-1] == ids and document.ids[-1] == tokenizer.eod


def test_tokens_that_depend_on_distant_text_are_a_bad_line():
    """Each piece begins with another token, and all that follow depend on it."""

    def encode(text):
        return [ord(text[0]) * 1000 + i for i in range(len(text))], range(len(text)), range(1, len(text) + 1)

    text = "".join(random.Random(2).choices(string.ascii_letters, k=5000))
    with pytest.raises(BadDocument, match="cannot be tokenized in pieces: the tokens around character 1600 depend on"):
        encode_in_pieces(text, encode, 400, 1600)
