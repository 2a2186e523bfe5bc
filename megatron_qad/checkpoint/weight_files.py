"""Which files of a Hugging Face model directory hold its weights, and which tensor is in which file.

A directory may hold several sets of weights. transformers reads ``model.safetensors``, and the files of the index only
if there is none. vLLM and SGLang read the files of the index, and every ``*.safetensors`` file if there is none; the
names of tensors in the index decide nothing. Directories that these loaders read differently are refused.
"""

from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open

from megatron_qad.checkpoint.model_directory import check_file
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.text_files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER_CONFIG = "adapter_config.json"
_NOT_READ = {
    "adapter_model*.safetensors": "an adapter (LoRA), not a model. Merge it into its base model with PEFT's "
    "merge_and_unload() and give the saved result.",
    "consolidated*.safetensors": "Mistral's own format. Give a directory in the Hugging Face format.",
    "model.*.safetensors": "a variant, which loaders read on request only. Rename it to model.safetensors.",
}
"""Patterns of files that loaders do not read next to the model's own, and what to do if there is nothing else."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_OTHER_FORMATS = ("*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.nemo")


def weight_files(directory: Path, config: dict) -> list[Path]:
    """Return the safetensors files that hold the weights.

    Raises:
        QADError: no such file, a damaged index, a file outside the directory, or several sets of weights of which
            loaders read different ones. The message names both.
    """
    single, index = directory / SINGLE, directory / INDEX
    if (directory / _ADAPTER_CONFIG).exists():
        raise QADError(
            f"{directory}: loaders disagree: transformers applies the adapter of {_ADAPTER_CONFIG} if PEFT is "
            "installed, other loaders ignore it. Remove the adapter's files, or merge it into the model with "
            "merge_and_unload() and give the saved result."
        )
    if index.exists() or index.is_symlink():
        names = _indexed(check_file(directory, index))
        if single.exists() and names != [SINGLE]:
            raise _disagree(directory, SINGLE, f"the files of {INDEX} ({names[0]}, ...)")
    else:
        names = _unindexed(directory)
    chosen = config.get("transformers_weights")
    if chosen is not None and chosen != (INDEX if index.exists() else names[0] if len(names) == 1 else None):
        raise _disagree(directory, f"{chosen!r} (transformers_weights of config.json)", names[0])
    return [check_file(directory, directory / name) for name in names]


def open_weights(file: Path):
    """Open a safetensors file. Raises QADError if it is truncated or damaged."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise QADError(f"{file}: not a complete safetensors file ({error}). Download it again.") from error


def check_index(directory: Path, stored: dict[str, list[Path]]) -> None:
    """Check that the index, if there is one, lists every tensor in the file that holds it.

    Args:
        stored: tensor name -> files that hold it.
    """
    index = directory / INDEX
    if not index.exists():
        return
    weight_map = read_json(index)["weight_map"]
    for name, file in weight_map.items():
        if directory / file not in stored.get(name, ()):
            raise QADError(f"{index}: {name} is listed in {file}, which does not hold it. Download the model again.")
    if unlisted := sorted(set(stored) - set(weight_map)):
        name = unlisted[0]
        raise QADError(
            f"{index}: {name} is in {stored[name][0].name}, but not in the index, so loaders disagree whether it is "
            "part of the model. Download the model again."
        )


def _indexed(index: Path) -> list[str]:
    """Return the files that an index lists, sorted."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        found = (
            "none"
            if weight_map is None
            else "an empty one"
            if weight_map == {}
            else f"a value of type {type(weight_map).__name__}"
        )
        raise QADError(
            f"{index}: no weight_map from tensor names to file names; found {found}. Expected the index that "
            "transformers writes. Download it again."
        )
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(".safetensors") or "\0" in name:
            raise QADError(
                f"{index}: {tensor} is listed in {name!r}, expected the name of a .safetensors file. Download it again."
            )
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise QADError(
                f"{index}: {tensor} is listed in {name!r}, which is outside the model directory. Do not use this model."
            )
        if not (index.parent / name).exists():
            raise QADError(f"{index}: {tensor} is listed in {name}, which is missing. Download it again.")
    return sorted(set(weight_map.values()))


def _unindexed(directory: Path) -> list[str]:
    """Return the weight files of a directory without an index, sorted."""
    present = sorted(path.name for path in directory.glob("*.safetensors"))
    not_read = {path.name: advice for pattern, advice in _NOT_READ.items() for path in directory.glob(pattern)}
    names = [name for name in present if name == SINGLE or name not in not_read]
    if SINGLE in names and len(names) > 1:
        other = next(name for name in names if name != SINGLE)
        raise _disagree(directory, f"{SINGLE} alone", f"{other} as well")
    if names:
        return names
    if not_read:
        name, advice = next(iter(not_read.items()))
        raise QADError(f"{directory}: no {SINGLE}. {name} is {advice}")
    raise QADError(f"{directory}: no .safetensors file. {_advice(directory)}")


def _advice(directory: Path) -> str:
    """Return what to do with a directory without safetensors files."""
    if pickles := sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern)):
        return (
            f"{pickles[0]} is a pickle, which may run code when it is loaded, and is not read. If you trust it, "
            "convert it: AutoModelForCausalLM.from_pretrained(DIR, dtype='auto').save_pretrained(NEW_DIR), and copy "
            "the tokenizer's files."
        )
    if others := sorted(path.name for pattern in _OTHER_FORMATS for path in directory.glob(pattern)):
        return f"{others[0]} has another format. Download the model's safetensors files."
    return "Download the model's weights too."


def _disagree(directory: Path, first: str, second: str) -> QADError:
    return QADError(
        f"{directory}: loaders disagree: transformers reads {first}, vLLM reads {second}. Remove the set of weights "
        "that is not to be imported."
    )
