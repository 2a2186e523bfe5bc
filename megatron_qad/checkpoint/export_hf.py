"""torch_dist -> Hugging Face, in BF16 or NVFP4: one layer at a time, with no model and no GPU.

The checkpoint says what it is: ``hf/config.json`` the architecture and ``qad.json`` the format of every linear. A
weight that the job saved on the NVFP4 grid packs to exactly itself; one saved between an optimizer step and its
quantization is rounded here, by the same arithmetic and with the same global scale, to what the next forward pass would
have used.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_qad.checkpoint.hf_reader import read_json
from megatron_qad.checkpoint.hf_writer import DEFAULT_SHARD_BYTES, Written, write_hf_checkpoint
from megatron_qad.checkpoint.layouts import HFTensor, LayoutName
from megatron_qad.checkpoint.torch_dist import TorchDistReader
from megatron_qad.formats import nvfp4, nvfp4_pack
from megatron_qad.models.families import family_of
from megatron_qad.models.families.base import TensorMap
from megatron_qad.runtime.errors import QADError

JOB_FILE = "qad.json"


def export_hf(
    checkpoint: str | Path, output: str | Path, layout: LayoutName, max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> Written:
    """Write the newest iteration of ``checkpoint`` as the Hugging Face directory ``output``.

    Args:
        checkpoint: a directory that a QAD job saved or, for layout "bf16", one that ``import_hf`` wrote.
        layout: "bf16", "modelopt" or "compressed-tensors". In "bf16" quantized weights stay on their grid.

    Raises:
        QADError: missing tensors or amaxes (named), a checkpoint without ``qad.json``, or what the writer refuses.
    """
    checkpoint = Path(checkpoint)
    if not (checkpoint / "hf" / "config.json").is_file():
        raise QADError(f"{checkpoint}: no hf/config.json; expected what import_hf.py or pretrain_qad.py wrote")
    config = read_json(checkpoint / "hf" / "config.json")
    family = family_of(config)
    formats = {} if layout == "bf16" else read_formats(checkpoint)
    reader = TorchDistReader(checkpoint)
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    linears = [name.removesuffix(".weight") for linear in family.linears(config) for name in linear.hf]
    items = _items(reader, family.tensors(config), formats)
    return write_hf_checkpoint(
        items,
        output,
        config=config,
        layout=layout,
        linear_modules=linears,
        source=checkpoint / "hf",
        max_shard_bytes=max_shard_bytes,
    )


def read_formats(checkpoint: Path) -> dict[str, str]:
    """Format of every linear, by Megatron weight name, as the job that saved the checkpoint resolved its policy."""
    file = checkpoint / JOB_FILE
    if not file.is_file():
        raise QADError(f"{checkpoint}: no {JOB_FILE}; only what pretrain_qad.py saved can be exported as NVFP4")
    return read_json(file)["formats"]


def _items(reader: TorchDistReader, maps: list[TensorMap], formats: dict[str, str]) -> Iterator[HFTensor]:
    for tensor_map, tensor in reader.layers(maps):
        if formats.get(tensor_map.megatron) == "nvfp4":
            yield from _nvfp4_items(reader, tensor_map, tensor)
        else:
            for name, part in zip(tensor_map.hf, tensor_map.to_hf(tensor), strict=True):
                yield HFTensor(name, part.contiguous())


def _nvfp4_items(reader: TorchDistReader, tensor_map: TensorMap, tensor: torch.Tensor) -> Iterator[HFTensor]:
    """One Megatron weight is what a server fuses (q, k, v; gate, up): its parts share both scales."""
    name = tensor_map.megatron
    amax_name = f"{tensor_map.megatron_module}.input_quantizer._amax"
    if amax_name not in reader:
        raise QADError(f"{reader.directory}: no {amax_name}; the job saved this checkpoint before it calibrated")
    input_amax = reader.read([amax_name])[amax_name]
    try:
        global_scale = nvfp4_pack.recover_global_scale(tensor, name=name)
        on_grid = nvfp4_pack.is_on_grid(tensor, global_scale, name=name)
    except nvfp4_pack.OffGridError:  # float32 weights that are not quantized yet
        global_scale, on_grid = nvfp4.global_scale_from_amax(nvfp4.tensor_amax(tensor), name=name), False
    input_scale = nvfp4.global_scale_from_amax(input_amax, name=amax_name)
    for hf_name, part in zip(tensor_map.hf, tensor_map.to_hf(tensor), strict=True):
        yield HFTensor(
            name=hf_name,
            tensor=part.contiguous(),
            module=hf_name.removesuffix(".weight"),
            fmt="nvfp4",
            global_scale=global_scale,
            input_scale=input_scale,
            on_grid=on_grid,
        )
