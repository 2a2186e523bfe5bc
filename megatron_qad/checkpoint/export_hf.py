"""Export torch_dist checkpoints to Hugging Face, in BF16 or quantized, one tensor at a time, without a model or a GPU.

The architecture comes from ``hf/config.json``, the format of every linear from ``qad.json``. A weight that was saved
quantized is packed exactly. A weight that was saved between an optimizer step and its quantization is quantized here,
with the same arithmetic and global scale as in the next forward pass. Worker processes and torchrun's ranks share the
tensors (``stream_shards``); an export that was killed continues after its finished shards.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import megatron_qad
from megatron_qad.checkpoint import finite, provenance, safetensors_file
from megatron_qad.checkpoint.hf_reader import PASSTHROUGH_FILE, declared_dtype
from megatron_qad.checkpoint.hf_writer import (
    DEFAULT_SHARD_BYTES,
    Description,
    Written,
    describe,
    new_directory,
    write_index,
)
from megatron_qad.checkpoint.layouts import (
    PACKED_LAYOUTS,
    HFTensor,
    LayoutName,
    check_format,
    kv_scales,
    stored_tensors,
)
from megatron_qad.checkpoint.partial_directory import PartialDirectory
from megatron_qad.checkpoint.release import lock_output, run_on_all_ranks
from megatron_qad.checkpoint.safetensors_file import Spec
from megatron_qad.checkpoint.source_quantization import without_quantization
from megatron_qad.checkpoint.stored_scales import StoredScales
from megatron_qad.checkpoint.stream_release import explained
from megatron_qad.checkpoint.stream_shards import Piece, ShardPlan, ShardWriter
from megatron_qad.checkpoint.torch_dist import TorchDistReader
from megatron_qad.checkpoint.trainer_checkpoint import TrainerCheckpointReader, is_trainer_checkpoint
from megatron_qad.checkpoint.transformers_support import transformers_problem
from megatron_qad.checkpoint.worker_pool import default_num_workers
from megatron_qad.engine.distributed import on_rank_0, rank_and_size
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import manifest
from megatron_qad.engine.run_directory.iterations import iteration_to_read
from megatron_qad.engine.run_directory.run_files import JOB_FILE
from megatron_qad.formats.format import NumberFormat
from megatron_qad.formats.format_registry import FORMATS, KV_CACHE_FORMATS, UNQUANTIZED
from megatron_qad.models.checkpoint_config import read_config, read_job
from megatron_qad.models.families import family_of
from megatron_qad.models.families.base import ParamMapping
from megatron_qad.quantization.scale_record import recorded_scales
from megatron_qad.quantization.scale_settings import ScaleSetting

_OVERFLOW = "Declare dtype bfloat16 in the model's config.json, import it again, and copy its hf/ to the checkpoint."


def export_hf(
    checkpoint: str | Path,
    output: str | Path,
    layout: LayoutName,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    iteration: int | str | None = None,
    num_workers: int | None = None,
) -> Written:
    """Write an iteration of ``checkpoint`` as the Hugging Face directory ``output``.

    torch.distributed must be initialized; every rank calls this. Peak memory of a process, beyond what it has imported:
    the largest tensor and its result. Tensors that are not packed are written in the dtype declared in
    ``config.json``, which servers expect, also if the job trained in float32. If the config declares none, they keep
    the dtype in which the job trained, and packed layouts declare it.

    Args:
        checkpoint: a directory saved by a QAD job or by QADTrainer or, for layout "bf16", one written by ``import_hf``.
        output: a new or empty directory.
        layout: "bf16", "modelopt" or "compressed-tensors". With "bf16" quantized weights are written as the values
            that the packed layouts decode to.
        max_shard_bytes: maximum size of the tensor data of a safetensors file.
        iteration: a number, "best" (by validation KL) or None for the newest.
        num_workers: worker processes of this rank. None: one for each core.

    Raises:
        QADError: a damaged checkpoint, missing tensors or amaxes, no ``qad.json``, an output that is not empty or is a
            mount point, a full disk, and errors of ``stored_tensors``. Nothing is left behind.

    Example::

        init_process_group()  # megatron_qad.engine.distributed
        written = export_hf("runs/qad", "exports/qad-nvfp4", "modelopt")
        print(written.num_tensors, written.excluded)
    """
    with lock_output(output):
        output = run_on_all_ranks(lambda: new_directory(output))
        export, description = _prepare(Path(checkpoint), layout, max_shard_bytes, iteration)
        plan = run_on_all_ranks(lambda: ShardPlan.of(export.pieces(), max_shard_bytes))
        excluded = _write(export, plan, description, output, num_workers or default_num_workers())
    shards = tuple(plan.names)
    quantized = export.quantized_modules()
    problem = transformers_problem(description.config, layout, quantized)
    dtype = str(export.dtype).removeprefix("torch.") if export.dtype else None
    return Written(output, len(plan.weight_map), plan.num_bytes, shards, quantized, tuple(excluded), problem, dtype)


def _prepare(
    checkpoint: Path, layout: LayoutName, max_shard_bytes: int, iteration: int | str | None
) -> tuple["Export", Description]:
    """Check and read everything but the weights."""
    config = read_config(checkpoint)
    manifest.verify_directory(checkpoint / "hf", "config.json")
    family = family_of(config)
    source = _Source.of(checkpoint, layout, iteration, family.tensors(config))
    job = source.job
    formats = job.get("formats", {})
    kv_cache = job.get("kv_cache", UNQUANTIZED.name) if layout != "bf16" else UNQUANTIZED.name
    if layout != "bf16":
        for fmt in sorted(set(formats.values())):
            check_format(fmt, layout, f"{checkpoint}: a linear of its policy")
    config = without_quantization(config)
    passthrough = read_passthrough(checkpoint / "hf")
    if family.passthrough_tensors(config) and not passthrough:
        raise QADError(
            f"{checkpoint}: no hf/{PASSTHROUGH_FILE}, to which the import writes all tensors outside the language "
            "model. Copy it from the imported checkpoint."
        )
    reader, maps, dtype = source.reader, family.tensors(config), declared_dtype(config)
    if layout != "bf16" and dtype is None:
        dtype = next(reader.stored_dtype(tensor_map) for tensor_map in maps if not tensor_map.is_float32)
        config["torch_dtype"] = str(dtype).removeprefix("torch.")  # the key that old and new readers know
    scales = recorded_scales(job, str(checkpoint / JOB_FILE)) if formats else {}
    amaxes = reader.read_amaxes() if layout != "bf16" else {}
    export = Export(reader, layout, formats, kv_cache, scales, dtype, amaxes, maps, passthrough)
    description = describe(
        config=config,
        layout=layout,
        linear_modules=[*family.linear_modules(config), *_passthrough_linears(passthrough)],
        source=checkpoint / "hf",
        max_shard_bytes=max_shard_bytes,
        kv_cache=kv_cache,
        record=source.record,
        calibration=export.calibration() if layout != "bf16" else None,
    )
    return export, description


def _write(export: "Export", plan: ShardPlan, description: Description, output: Path, num_workers: int) -> list[str]:
    """Write the output; return the linears that are not quantized."""
    job = {"export": description.record, "shards": [layout.digest for layout in plan.layouts]}
    partial, (rank, size) = PartialDirectory(output, job | {"version": megatron_qad.__version__}), rank_and_size()
    on_rank_0(partial.open)
    try:
        writer = ShardWriter(plan, partial, export.stored)
        local_shards = range(rank, len(plan.names), size)
        run_on_all_ranks(lambda: explained(output, lambda: writer.write(local_shards, num_workers, rank == 0)))

        def complete() -> list[str]:
            weight_map = {name: plan.names[shard] for name, shard in plan.weight_map.items()}
            write_index(partial.path, weight_map, plan.num_bytes)
            excluded = description.write(partial.path, export.quantized_modules(), writer.sums())
            partial.publish()
            return excluded

        return on_rank_0(lambda: explained(output, complete))
    except QADError:
        on_rank_0(partial.remove)
        raise


def export_provenance(checkpoint: str | Path, layout: LayoutName, iteration: int | str | None = None) -> dict:
    """Return the provenance record that ``export_hf`` with the same arguments would write; reads no weights."""
    directory, job = _directory_and_job(Path(checkpoint), layout, iteration)
    if is_trainer_checkpoint(job):
        return provenance.trainer_provenance(directory, layout, job)
    return provenance.iteration_provenance(directory, layout, job)


@dataclass(frozen=True)
class _Source:
    """What is exported: an iteration of a run, an imported model, or a checkpoint of QADTrainer."""

    reader: TorchDistReader | TrainerCheckpointReader
    job: dict
    """Contents of ``qad.json``; empty for an imported model."""
    record: dict
    """Provenance record of the export."""

    @classmethod
    def of(
        cls, checkpoint: Path, layout: LayoutName, iteration: int | str | None, maps: Sequence[ParamMapping]
    ) -> "_Source":
        directory, job = _directory_and_job(checkpoint, layout, iteration)
        if is_trainer_checkpoint(job):
            record = provenance.trainer_provenance(directory, layout, job) | provenance.trainer_starting_point(job)
            return cls(TrainerCheckpointReader(checkpoint, maps), job, record)
        record = provenance.iteration_provenance(directory, layout, job) | provenance.starting_point(directory, job)
        return cls(TorchDistReader(checkpoint, iteration), job, record)


def _directory_and_job(checkpoint: Path, layout: LayoutName, iteration: int | str | None) -> tuple[Path, dict]:
    """Return the directory of the tensors and qad.json; layout bf16 also accepts imports, which have no qad.json."""
    job = read_job(checkpoint)
    if layout != "bf16" and job is None:
        raise QADError(
            f"{checkpoint}: no {JOB_FILE}; only checkpoints of pretrain_qad.py and of QADTrainer can be exported "
            "quantized. Use the layout bf16, or quantize it first: megatron-qad ptq, or megatron-qad train."
        )
    if is_trainer_checkpoint(job):
        if iteration is not None:
            raise QADError(
                f"{checkpoint}: is one checkpoint of QADTrainer, found iteration {iteration}. Leave it out, and give "
                "the directory of the checkpoint."
            )
        return checkpoint, job
    directory = iteration_to_read(checkpoint, iteration)
    return directory, read_job(checkpoint, directory) or {}


def read_passthrough(assets: Path) -> dict[str, torch.Tensor]:
    """Return the passthrough tensors that the import stored, by Hugging Face name."""
    file = assets / PASSTHROUGH_FILE
    try:
        return load_file(file) if file.is_file() else {}
    except SafetensorError as error:
        raise QADError(
            f"{file}: not a complete safetensors file ({error}). Copy it from the imported checkpoint."
        ) from error


def _passthrough_linears(passthrough: dict[str, torch.Tensor]) -> list[str]:
    """Return passthrough modules that a server may build as linears and that a packed checkpoint must exclude: those
    with a matrix, except routers and embeddings."""
    names = [name for name, tensor in passthrough.items() if name.endswith(".weight") and tensor.dim() == 2]
    return [name.removesuffix(".weight") for name in names if ".gate." not in name and "embed" not in name]


@dataclass(frozen=True)
class Export:
    """Conversion of one checkpoint to tensors with Hugging Face names."""

    reader: TorchDistReader | TrainerCheckpointReader
    layout: LayoutName
    formats: dict[str, str]
    kv_cache: str
    scales: Mapping[str, ScaleSetting]
    """How the scales of each weight with block scales were obtained, by Megatron weight name."""
    dtype: torch.dtype | None
    """dtype of tensors that are not packed. None means the stored dtype."""
    amaxes: dict[str, torch.Tensor]
    """Amaxes of inputs, keys and values by the names of the quantizers' buffers."""

    maps: Sequence[ParamMapping] = ()
    """The tensors of the model."""
    passthrough: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Tensors that are stored unchanged, by Hugging Face name; views of a mapped file."""

    def pieces(self) -> list[Piece["ParamMapping | str"]]:
        """Return all tensors to export, with the dtypes and shapes that ``stored`` will return. Reads no weight."""
        pieces = [Piece(m, prod(m.shape) * self.reader.stored_dtype(m).itemsize, self._specs(m)) for m in self.maps]
        specs = {name: safetensors_file.spec_of(tensor) for name, tensor in self.passthrough.items()}
        return pieces + [Piece(name, tensor.nbytes, {name: specs[name]}) for name, tensor in self.passthrough.items()]

    def stored(self, source: "ParamMapping | str") -> Iterator[tuple[str, torch.Tensor]]:
        """Read, convert and yield the stored tensors of one Megatron tensor, or of a passthrough tensor."""
        is_map = isinstance(source, ParamMapping)
        for item in self.items([source]) if is_map else [HFTensor(source, self.passthrough[source])]:
            yield from stored_tensors(item, self.layout).items()

    def quantized_modules(self) -> dict[str, str]:
        """Return {Hugging Face module: format} of the linears that are stored quantized."""
        return {
            name.removesuffix(".weight"): self.format_of(tensor_map)
            for tensor_map in self.maps
            if self._is_packed(tensor_map)
            for name in tensor_map.hf
        }

    def calibration(self) -> dict[str, dict[str, float]]:
        """Return the amaxes of inputs, keys and values by Hugging Face module, for ``calibration.json``."""
        record: dict[str, dict[str, float]] = {"inputs": {}, "keys": {}, "values": {}}
        for tensor_map in self.maps:
            modules = [name.removesuffix(".weight") for name in tensor_map.hf]
            if self._is_packed(tensor_map) and FORMATS[self.format_of(tensor_map)].input is not None:
                record["inputs"] |= dict.fromkeys(modules, self._input_amax(tensor_map).item())
            if self._has_kv_scales(tensor_map):
                pairs = zip(("keys", "values"), modules[1:], self._kv_amaxes(tensor_map), strict=True)
                for key, module, amax in pairs:
                    record[key][module] = amax.item()
        return record

    def format_of(self, tensor_map: ParamMapping) -> str:
        return self.formats.get(tensor_map.megatron, UNQUANTIZED.name)

    def _is_packed(self, tensor_map: ParamMapping) -> bool:
        return self.layout != "bf16" and FORMATS[self.format_of(tensor_map)].quantizes

    def _specs(self, tensor_map: ParamMapping) -> dict[str, Spec]:
        specs: dict[str, Spec] = {}
        stored_dtype = self.reader.stored_dtype(tensor_map)
        dtype = stored_dtype if tensor_map.is_float32 else self.dtype or stored_dtype
        for name, shape in zip(tensor_map.hf, tensor_map.hf_shapes(), strict=True):
            if self._is_packed(tensor_map):
                parts = PACKED_LAYOUTS[self.layout].expected(self.format_of(tensor_map), *shape)
                specs |= {f"{name.removesuffix('.weight')}.{part}": spec for part, spec in parts.items()}
            else:
                specs[name] = safetensors_file.DTYPES[dtype], shape
        return specs | {item.name: safetensors_file.spec_of(item.tensor) for item in self._kv_scales(tensor_map)}

    def items(self, maps: list[ParamMapping]) -> Iterator[HFTensor]:
        """Yield every tensor layer by layer in the order of ``maps``; KV cache scales follow the projection weights."""
        for tensor_map, tensor in self.reader.layers(maps):
            fmt = self.format_of(tensor_map)
            if not self._is_packed(tensor_map):
                if (number_format := FORMATS[fmt].weight) is not None:
                    tensor = self._scales(tensor_map, number_format).as_exported(tensor, tensor_map.megatron)
                for name, part in zip(tensor_map.hf, tensor_map.to_hf(tensor), strict=True):
                    dtype = part.dtype if tensor_map.is_float32 else self.dtype or part.dtype
                    yield HFTensor(name, finite.cast(part, dtype, name, _OVERFLOW).contiguous())
            else:
                yield from self._pack(tensor_map, tensor, fmt)
            yield from self._kv_scales(tensor_map)

    def _pack(self, tensor_map: ParamMapping, tensor: torch.Tensor, fmt: str) -> Iterator[HFTensor]:
        """Yield the parts of one Megatron weight, which servers fuse (q, k, v; gate, up), with shared scales."""
        name = tensor_map.megatron
        linear_format, input_scale = FORMATS[fmt], None
        if linear_format.input is not None:
            input_scale = linear_format.input.input_scale_from_amax(self._input_amax(tensor_map), name=name)
        scales = self._scales(tensor_map, linear_format.weight)
        scale, parts, codes = scales.pack(tensor_map, tensor)
        for i, (hf_name, part) in enumerate(zip(tensor_map.hf, parts, strict=True)):
            yield HFTensor(
                name=hf_name,
                tensor=part,
                module=hf_name.removesuffix(".weight"),
                fmt=fmt,
                weight_scale=scale,
                input_scale=input_scale,
                is_fake_quantized=codes is not None,
                scale_rule=scales.rule,
                codes=None if codes is None else codes[i],
            )

    def _scales(self, tensor_map: ParamMapping, number_format: NumberFormat) -> StoredScales:
        setting = self.scales.get(tensor_map.megatron, ScaleSetting())
        return StoredScales.read(self.reader, tensor_map, number_format, setting)

    def _kv_scales(self, tensor_map: ParamMapping) -> Iterator[HFTensor]:
        """Yield the scales of the KV cache, if it is quantized and this is the weight of q, k and v."""
        if self._has_kv_scales(tensor_map):
            _, k_proj, v_proj = (name.removesuffix(".weight") for name in tensor_map.hf)
            amaxes, kv_format = self._kv_amaxes(tensor_map), KV_CACHE_FORMATS[self.kv_cache]
            yield from kv_scales(k_proj, v_proj, *amaxes, self.layout, kv_format)

    def _has_kv_scales(self, tensor_map: ParamMapping) -> bool:
        is_quantized = KV_CACHE_FORMATS[self.kv_cache] is not None
        return is_quantized and tensor_map.megatron.endswith("self_attention.linear_qkv.weight")

    def _kv_amaxes(self, tensor_map: ParamMapping) -> list[torch.Tensor]:
        attention = tensor_map.megatron_module.rsplit(".", 1)[0]
        return [self._amax(f"{attention}.core_attention.{x}_bmm_quantizer._amax") for x in "kv"]

    def _input_amax(self, tensor_map: ParamMapping) -> torch.Tensor:
        return self._amax(f"{tensor_map.megatron_module}.input_quantizer._amax")

    def _amax(self, name: str) -> torch.Tensor:
        if name not in self.amaxes:
            raise QADError(
                f"{self.reader.directory}: no {name}: the checkpoint was saved before calibration. Export a later one."
            )
        return self.amaxes[name]
