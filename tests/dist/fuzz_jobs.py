"""Reads damaged models and chats for the fuzz test, all in one process of the fork server."""

import contextlib
import io
import json
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import tiny_job
import tokenizers
from fuzz_inputs import CHATS, WEIGHTS, grid
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB_SIZE = 280  # 256 bytes, three special tokens and a few merges; Megatron pads it to 384


def make_inputs(directory: str) -> None:
    """Write the pristine inputs: a model with tokenizer in ``model``, chats in ``chats``, prepared data in ``data``."""
    from megatron_qad.checkpoint.import_hf import import_hf
    from megatron_qad.engine.distributed import init_process_group

    init_process_group()
    root = Path(directory)
    config = tiny_job.LLAMA | {"vocab_size": VOCAB_SIZE, "dtype": "bfloat16", "hidden_act": "silu"}
    tiny_job.write_hf(root / "model", config)
    _write_in_two_files(root / "model")
    texts = [f"hello {i}, this is answer number {i * i}." for i in range(60)]
    _write_tokenizer(root / "model", texts)
    (root / "chats").mkdir()
    with (root / "chats" / CHATS).open("w") as chats:
        for i, text in enumerate(texts):
            messages = [{"role": "user", "content": f"hello, what is {i}?"}, {"role": "assistant", "content": text}]
            chats.write(json.dumps({"messages": messages}) + "\n")
    (root / "data").mkdir()
    prepare(root, root / "data")
    import_hf(root / "model", root / "teacher")


def _write_in_two_files(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    names, half = sorted(tensors), len(tensors) // 2
    weight_map = {}
    for file, part in zip(WEIGHTS, (names[:half], names[half:]), strict=True):
        save_file({name: tensors[name] for name in part}, model / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model.safetensors").unlink()


def _write_tokenizer(model: Path, texts: list[str]) -> None:
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|im_end|>", "<pad>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<pad>")
    fast.chat_template = CHATML
    fast.save_pretrained(model)


def prepare(root: Path, output: Path, chats: Path | None = None) -> None:
    """Prepare the chats, without accepting a bad line."""
    from megatron_qad.data.prepare import PrepareOptions, prepare_data

    inputs = [str((chats or root / "chats") / CHATS)]
    prepare_data(PrepareOptions(inputs, str(root / "model"), str(output / "data"), max_bad_fraction=0.0))


def read_models_and_chats(directory: str, numbers: list[int], data_files: list[str], cache_files: list[str]) -> None:
    """Apply the grid's damages with these numbers to models and chats, and print one JSON line for each."""
    from megatron_qad.engine.distributed import init_process_group

    init_process_group()
    root = Path(directory)
    damages = grid(data_files, cache_files)
    readers = {"model": _import_and_export, "config": _import_and_export, "chats": _prepare}
    folders = {"model": "model", "config": "model", "chats": "chats"}
    expected: dict[Callable, tuple] = {}
    for number in numbers:
        damage = damages[number]
        reader, folder = readers[damage.input], root / folders[damage.input]
        if reader not in expected:
            expected[reader] = _outcome(reader, root, folder)
            assert expected[reader][0] == "result", expected[reader]
        work = root / "damaged"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder, work / folder.name)
        damage.apply(work / folder.name)
        kind, found = _outcome(reader, root, work / folder.name)
        if kind == "result":
            kind, found = ("same", "") if found == expected[reader][1] else ("silent", "another result")
        sys.__stdout__.write(json.dumps({"number": number, "outcome": kind, "message": found}) + "\n")
    sys.__stdout__.flush()


def _outcome(reader: Callable, root: Path, folder: Path) -> tuple[str, object]:
    from megatron_qad.engine import QADError

    output = root / "output"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return "result", reader(root, folder, output)
    except QADError as error:
        return "error", str(error)
    except Exception:  # a user would see a traceback
        return "traceback", traceback.format_exc()


def _import_and_export(root: Path, model: Path, output: Path) -> dict[str, bytes]:
    """Import and export a model; return the weights, the tokenizer and what training would build."""
    from megatron_qad.checkpoint.export_hf import export_hf
    from megatron_qad.checkpoint.import_hf import import_hf
    from megatron_qad.models.checkpoint_config import read_config
    from megatron_qad.models.families import family_of

    import_hf(model, output / "imported")
    config = read_config(output / "imported")
    export_hf(output / "imported", output / "exported", "bf16")
    files = {f.name: f.read_bytes() for f in (output / "exported").iterdir() if f.suffix != ".md"}
    for record in ("config.json", "qad_export.json"):  # the damage itself, and its sums
        files.pop(record, None)
    return files | {"built": repr(family_of(config).megatron_args(config)).encode()}


def _prepare(root: Path, chats: Path, output: Path) -> dict[str, bytes]:
    prepare(root, output, chats)
    return {f.name: f.read_bytes() for f in output.iterdir()}
