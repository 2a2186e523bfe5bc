"""Where an ordinary Megatron checkpoint stores each tensor of a model: names only, no tensor is read.

A ``GPTModel`` has attention and MLP of a block in one layer, ``decoder.layers.{block}``, where the ``HybridModel`` of
this project has two layers. It stores the tensors of all layers as one tensor with a leading axis, ``decoder.layers.*``
[blocks, ...], or each layer separately. Experts are stored in the same two ways. ``HybridModel`` (``MambaModel``) has
the names of this project, except for the experts.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from megatron_qad.checkpoint.slice_reader import Slice, Stored
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.plural import count
from megatron_qad.models.families.base import ParamMapping
from megatron_qad.models.weight_loading import GATED_HALVES

_GPT_NORM, _HYBRID_NORM = "decoder.final_layernorm.weight", "decoder.final_norm.weight"
# Fused norms of Transformer Engine (and of the local spec, which maps its names to them), and norms of their own.
_NORM_NAMES = (
    ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    ("mixer.in_proj.layer_norm_weight", "norm.weight"),
)
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(mlp\.experts\.experts)\.(\d+)\.(.+)")
_HF_BLOCK = re.compile(r"\blayers\.(\d+)\.")
_MODEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# At 64 tensor-parallel ranks Megatron pads the vocabulary to a multiple of 64 * 128 by default.
_MAX_VOCAB_PADDING = 64 * 128


@dataclass(frozen=True)
class Piece:
    """A part of a tensor: ``checkpoint[name][index]``."""

    name: str
    index: tuple[int, ...]
    """Position on each leading axis: the block and the expert, where they are stored as axes."""
    sizes: tuple[int, ...]
    """Length of each leading axis."""
    shape: tuple[int, ...]
    """Shape without the leading axes. Embedding and head include the stored padding of the vocabulary."""

    @property
    def slice(self) -> Slice:
        return Slice(self.name, self.index + (0,) * len(self.shape), (1,) * len(self.index) + self.shape)


def is_gpt(stored: Mapping[str, Stored], checkpoint: object) -> bool:
    """Return whether the checkpoint is a ``GPTModel``; False for a ``HybridModel``.

    Raises:
        QADError: it is neither.
    """
    if (_GPT_NORM in stored) != (_HYBRID_NORM in stored):
        return _GPT_NORM in stored
    first = sorted(stored)[0] if stored else "no tensor"
    raise QADError(
        f"{checkpoint}: expected either {_GPT_NORM!r} (a GPTModel) or {_HYBRID_NORM!r} (a HybridModel or MambaModel), "
        f"found {'both' if _GPT_NORM in stored else 'neither'}. The first of {count(len(stored), 'tensor')} is "
        f"{first!r}. Other models cannot be imported."
    )


def locate(
    maps: Sequence[ParamMapping], stored: Mapping[str, Stored], checkpoint: object
) -> dict[str, tuple[Piece, ...]]:
    """Return the pieces of every tensor of ``maps``, by its Megatron name in this project.

    Args:
        maps: all tensors of the model.
        stored: all tensors of the checkpoint that belong to the model.
        checkpoint: directory to name in errors.

    Raises:
        QADError: a tensor is missing, unexpected, or has another shape or a dtype that is not a weight's; the message
            names the first one.
    """
    gpt = is_gpt(stored, checkpoint)
    axes = _Axes.of(maps)
    pieces, missing = {}, []
    for tensor_map in maps:
        found = _find(tensor_map, stored, gpt, axes)
        if found is None:
            missing.append(next(_candidates(tensor_map, gpt, axes))[0])
        else:
            pieces[tensor_map.megatron] = found
    used = Counter(piece.name for parts in pieces.values() for piece in parts)
    _check_names(missing, sorted(stored.keys() - used.keys()), gpt, checkpoint)
    for tensor_map in maps:
        for piece in pieces[tensor_map.megatron]:
            _check_piece(piece, stored[piece.name], tensor_map, checkpoint)
    _check_use(used, pieces, stored, checkpoint)
    return pieces


@dataclass(frozen=True)
class _Axes:
    """Lengths of the axes on which a checkpoint may store several tensors as one."""

    blocks: int
    experts: int

    @classmethod
    def of(cls, maps: Sequence[ParamMapping]) -> "_Axes":
        experts = [int(match[2]) for m in maps if (match := _EXPERT.search(m.megatron))]
        blocks = [_block(m) for m in maps if m.layer is not None]
        return cls(1 + max(blocks, default=0), 1 + max(experts, default=0))


def _block(tensor_map: ParamMapping) -> int:
    """Return the block in the Hugging Face model, which is the layer of a ``GPTModel``."""
    return int(_HF_BLOCK.search(tensor_map.hf[0])[1])


def _candidates(tensor_map: ParamMapping, gpt: bool, axes: _Axes) -> Iterator[tuple[str, tuple, tuple]]:
    """Yield (name, index, sizes of the leading axes) of the places where a tensor may be stored."""
    match = _LAYER.fullmatch(tensor_map.megatron)
    if match is None:
        yield (_GPT_NORM if gpt and tensor_map.megatron == _HYBRID_NORM else tensor_map.megatron), (), ()
        return
    layers, rest = [(f"decoder.layers.{match[1]}.", (), ())], match[2]
    if gpt:
        block = _block(tensor_map)
        layers = [(f"decoder.layers.{block}.", (), ()), ("decoder.layers.", (block,), (axes.blocks,))]
    rests = [(name, (), ()) for name in _norm_names(rest)]
    if expert := _EXPERT.fullmatch(rest):
        rests.append((f"{expert[1]}.{expert[3]}", (int(expert[2]),), (axes.experts,)))
    for layer, module in product(layers, rests):
        yield tuple(a + b for a, b in zip(layer, module, strict=True))


def _norm_names(rest: str) -> tuple[str, ...]:
    return next((names if rest == names[0] else names[::-1] for names in _NORM_NAMES if rest in names), (rest,))


def _find(tensor_map: ParamMapping, stored: Mapping[str, Stored], gpt: bool, axes: _Axes) -> tuple[Piece, ...] | None:
    splits = tensor_map.checkpoint_splits
    ways = [{"": tensor_map.shape[0]}, splits]
    if tensor_map.megatron.endswith("linear_fc1.weight") and len(tensor_map.hf) == 2:  # gate and up
        ways.append(dict.fromkeys(GATED_HALVES, tensor_map.shape[0] // 2))
    for (name, index, sizes), rows in product(_candidates(tensor_map, gpt, axes), ways):
        if all(name + ending in stored for ending in rows):
            padded = tensor_map.kind in ("embedding", "head")
            rows = {"": stored[name].shape[0]} if padded and stored[name].shape else rows
            return tuple(
                Piece(name + ending, index, sizes, (num, *tensor_map.shape[1:])) for ending, num in rows.items()
            )
    return None


def _check_names(missing: list[str], unexpected: list[str], gpt: bool, checkpoint: object) -> None:
    kind = "GPTModel" if gpt else "HybridModel"
    if not missing and not unexpected:
        return
    parts = []
    if missing:
        parts.append(f"it lacks {count(len(missing), 'tensor')} of the model in config.json, first {missing[0]!r}")
    if unexpected:
        parts.append(f"it has {count(len(unexpected), 'tensor')} that the model lacks, first {unexpected[0]!r}")
    hint = ""
    if unexpected == ["output_layer.weight"]:
        hint = " The head is stored separately: config.json must have tie_word_embeddings false."
    elif missing == ["output_layer.weight"]:
        hint = " The head is tied to the embedding: config.json must have tie_word_embeddings true."
    raise QADError(
        f"{checkpoint}: {' and '.join(parts)}. The checkpoint is a {kind}.{hint} Give the config.json of this model "
        "with --hf-config."
    )


def _check_piece(piece: Piece, stored: Stored, tensor_map: ParamMapping, checkpoint: object) -> None:
    expected = (*piece.sizes, *piece.shape)
    if stored.shape != expected:
        raise QADError(
            f"{checkpoint}: {piece.name} has shape {list(stored.shape)}, but config.json implies {list(expected)}."
        )
    if stored.dtype not in _MODEL_DTYPES:
        raise QADError(
            f"{checkpoint}: {piece.name} has dtype {str(stored.dtype).removeprefix('torch.')}, expected bfloat16, "
            "float16 or float32. Give a checkpoint whose weights are not quantized."
        )
    vocab = tensor_map.shape[0]
    if tensor_map.kind in ("embedding", "head") and not vocab <= piece.shape[0] < vocab + _MAX_VOCAB_PADDING:
        raise QADError(
            f"{checkpoint}: {piece.name} has {piece.shape[0]} rows, but config.json has vocab_size {vocab}. Expected "
            f"that number and fewer than {_MAX_VOCAB_PADDING} rows of padding."
        )


def _check_use(used: Counter, pieces: Mapping, stored: Mapping[str, Stored], checkpoint: object) -> None:
    """Check that each tensor with leading axes is used completely: a config may leave out a block of the checkpoint."""
    for piece in (piece for parts in pieces.values() for piece in parts):
        slices = torch.Size(piece.sizes).numel()
        if used[piece.name] != slices:
            raise QADError(
                f"{checkpoint}: {piece.name} has shape {list(stored[piece.name].shape)}, but the model in config.json "
                f"has only {used[piece.name]} of its {slices} parts."
            )
