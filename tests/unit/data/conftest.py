"""Fixtures: tokenizers trained on CPython's help text, data files prepared with them, and Megatron's arguments."""

import json
import os
import pydoc_data.topics
import sys

import pytest
import sentencepiece
import tokenizers
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from megatron_qad.data.data_options import DataOptions
from megatron_qad.data.images.image_settings import ImageSettings
from megatron_qad.data.prepare import PrepareOptions, prepare_data
from megatron_qad.data.tokenizer import load_tokenizer
from megatron_qad.engine import init_runtime

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
init_runtime()  # must run before the test modules import megatron

from megatron_qad.data.provider import DatasetsProvider  # noqa: E402

CORPUS = [text for _, text in sorted(pydoc_data.topics.topics.items())][:30]

# ChatML as SmolLM2 has it: a newline after the end of each turn, and EOS is the end of a turn.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# {{ '\\n' }}: with transformers' settings jinja drops a newline directly after a block.
CHATML_TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return CORPUS


@pytest.fixture(scope="session")
def sp_model(tmp_path_factory):
    """Path of a sentencepiece .model file with 400 pieces that keeps white space and falls back to bytes."""
    directory = tmp_path_factory.mktemp("sp")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS[:10] for line in text.splitlines() if line),
        model_prefix=str(directory / "tiny"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        num_threads=1,
        minloglevel=2,
    )
    return directory / "tiny.model"


# Renders the parts of content, images included, as templates of vision-language models do.
CHATML_PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _hf_tokenizer(directory, template, eos="<|im_end|>", specials=()):
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    # trim_offsets=True as in the files of GPT-2 and SmolLM2: offsets exclude white space.
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *specials]
    bpe.train_from_iterator(
        CORPUS[:10],
        tokenizers.trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=specials,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|im_start|>", eos_token=eos, pad_token=eos)
    fast.chat_template = template
    fast.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def hf_dir(tmp_path_factory):
    return _hf_tokenizer(tmp_path_factory.mktemp("hf") / "chatml", CHATML)


@pytest.fixture(scope="session")
def hf_tagged_dir(tmp_path_factory):
    return _hf_tokenizer(tmp_path_factory.mktemp("hf") / "chatml_tagged", CHATML_TAGGED)


@pytest.fixture(scope="session")
def make_hf_dir(tmp_path_factory):
    """``make_hf_dir(template, eos=...)``: save a tokenizer with this template and return its directory."""
    return lambda template, **kwargs: _hf_tokenizer(tmp_path_factory.mktemp("hf") / "other", template, **kwargs)


@pytest.fixture(scope="session")
def vision_dir(make_hf_dir):
    """A tokenizer with the tokens of images, whose template takes strings."""
    return make_hf_dir(CHATML, specials=["<image>", "<img>", "</img>"])


@pytest.fixture(scope="session")
def vision_parts_dir(make_hf_dir):
    """The same tokenizer with a template that renders parts of content and images."""
    return make_hf_dir(CHATML_PARTS, specials=["<image>", "<img>", "</img>"])


@pytest.fixture(scope="session")
def image_settings(vision_dir):
    """Tiles of 64 pixels with 4 tokens, at most 4 and a thumbnail."""
    ids = load_tokenizer(vision_dir).vocab
    return ImageSettings(
        family="Tiny",
        tile_size=64,
        patch_size=16,
        max_tiles=4,
        use_thumbnail=True,
        tokens_per_tile=4,
        grid_rule="closest_ratio",
        image_token="<image>",
        image_token_id=ids["<image>"],
        start_token="<img>",
        start_token_id=ids["<img>"],
        end_token="</img>",
        end_token_id=ids["</img>"],
    )


@pytest.fixture
def write_image(tmp_path):
    """``write_image(name, width, height, color)``: write an image of one color and return its path."""

    def write(name, width=64, height=64, color=(255, 0, 0)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (width, height), color).save(path)
        return path

    return write


@pytest.fixture(scope="session")
def hf_tokenizer(hf_dir):
    return load_tokenizer(hf_dir)


@pytest.fixture(scope="session")
def hf_tagged(hf_tagged_dir):
    return load_tokenizer(hf_tagged_dir)


@pytest.fixture
def write_jsonl(tmp_path):
    """``write_jsonl(lines, name)``: write a JSONL file; dicts become JSON, strings are written unchanged."""

    def write(lines, name="input.jsonl"):
        path = tmp_path / name
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def prepared(tmp_path):
    """``prepared(inputs, tokenizer, **options)``: prepare data and return (prefix, metadata)."""

    def run(inputs, tokenizer, name="out", **options):
        prefix = str(tmp_path / name)
        inputs = [inputs] if isinstance(inputs, str) else inputs
        return prefix, prepare_data(PrepareOptions(inputs=inputs, tokenizer=str(tokenizer), output=prefix, **options))

    return run


@pytest.fixture
def args_for(monkeypatch, hf_dir):
    """``args_for("--data-path", prefix)``: Megatron's parsed arguments."""
    from megatron.training.arguments import parse_args

    def make(*flags):
        split = [] if "--train-data-path" in flags else ["--split", "80,20,0"]
        common = ["--seq-length", "16", *split, "--no-create-attention-mask-in-dataloader"]
        tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(hf_dir)]
        monkeypatch.setattr(sys, "argv", ["test", *common, *tokenizer, *flags])
        args = parse_args()
        # Set here because validate_args, which derives these, also needs the arguments of a model.
        args.data_parallel_size, args.padded_vocab_size, args.tensor_model_parallel_size = 1, 512, 1
        args.micro_batch_size = 2
        args.eval_micro_batch_size, args.eval_global_batch_size, args.consumed_valid_samples = 2, 4, 0
        return args

    return make


@pytest.fixture
def provider_for(args_for):
    """``provider_for(*flags, **changes)``: the datasets provider of a job with these flags."""

    def make(*flags, **changes):
        args = args_for(*flags)
        vars(args).update(changes)
        given = args.eval_iters if "--eval-iters" in flags else None
        return DatasetsProvider(args, DataOptions(calibration_samples=8, eval_iters=given))

    return make


@pytest.fixture
def one_process(tmp_path):
    from megatron.core import parallel_state
    from megatron.training.global_vars import destroy_global_vars

    if torch.distributed.is_initialized():  # by a test of another folder
        torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    destroy_global_vars()
