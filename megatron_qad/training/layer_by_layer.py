"""Runs models one layer at a time (``--qad-ptq-sequential``), to calibrate and validate what does not fit into memory.

All microbatches pass through a layer before the next one is loaded. Their hidden states are kept in host memory between
two layers. Megatron's own model code runs the layers, each as a virtual pipeline stage of its own, so that amaxes and
validation equal those of the whole model bit for bit. Data-parallel ranks hold the same layer and other microbatches.
"""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from megatron.core.utils import unwrap_model
from megatron.training.utils import is_rank0
from torch import Tensor
from tqdm import tqdm

from megatron_qad.config.job_config import JobConfig, ModelConfig
from megatron_qad.engine.errors import QADError
from megatron_qad.models.builder import freeze
from megatron_qad.models.output_layer import ModelOutput
from megatron_qad.models.single_layers import SingleLayers
from megatron_qad.models.weight_loading import load_weights, quantizers_to_save, stored_dtypes, weight_dtypes
from megatron_qad.training.batch import Batch
from megatron_qad.training.models import model_config, replace_model_shape


@dataclass
class QuantizedLayers:
    """What remains of a calibrated model whose layers are freed."""

    quantizers: dict = field(default_factory=dict)
    """Sharded state dict of the amaxes, and of the extra state of modules."""
    weights: set[str] = field(default_factory=set)
    """Names of the model's tensors in the checkpoint."""


class Stream:
    """Microbatches on their way through the layers of a model, with their hidden states in host memory.

    Args:
        job: the ``QADJob``.
        batches: microbatches of this rank.
    """

    def __init__(self, job, batches: Sequence[Batch]):
        self._job, self.batches = job, batches
        self.states: list[Tensor | None] = [None] * len(batches)
        """Hidden states [s, b, H] of each microbatch after the latest layer; after the last one, after the final norm.
        None before the first layer."""

    def advance(self, layer: torch.nn.Module) -> None:
        """Replace the hidden states by their output of ``layer``."""
        for i, output in enumerate(self.outputs(layer, hidden=True)):
            self.states[i] = output.cpu()

    def outputs(self, layer: torch.nn.Module, *, hidden: bool) -> Iterator[Tensor]:
        """Yield the output of ``layer`` for each microbatch: of the last one logits, unless ``hidden`` is set."""
        for batch, state in zip(self.batches, self.states, strict=True):
            if state is not None:
                unwrap_model(layer).set_input_tensor(state.to(torch.cuda.current_device()))
            self._job.num_passes += 1
            yield self._job.forward(layer, batch, hidden=hidden)


@torch.no_grad()
def run_teacher(job, batches: Sequence[Batch]) -> None:
    """Run the teacher on microbatches and store its final hidden states in them. Keeps its output layer in memory."""
    model, stream = job.config.teacher, Stream(job, batches)
    layers = SingleLayers(model_config(job.config, replace_model_shape(job.config, job.args, model), model))
    for index in _indices(job, layers, "teacher"):
        _run_teacher_layer(layers, index, model.checkpoint, stream)


def _run_teacher_layer(layers: SingleLayers, index: int, checkpoint: str, stream: Stream) -> None:
    layer = _load(layers, index, checkpoint)
    stream.advance(layers.wrap(layer))
    if layer.post_process:
        layer.decoder = torch.nn.Identity()  # only the output layer is still needed
        for batch, state in zip(stream.batches, stream.states, strict=True):
            batch.teacher_output = ModelOutput(state, layer)


@torch.no_grad()
def quantize_layers(job, calibration: Sequence[Batch], validation: Sequence[Batch]) -> QuantizedLayers:
    """Calibrate the student's layers one after the other, and run the quantized ones on the validation microbatches.

    Calibration observes the unquantized model. The job's loss gets the metrics of the validation. Collective over the
    data-parallel ranks.

    Args:
        calibration: microbatches that set the amaxes.
        validation: microbatches with the teacher's outputs; empty for no validation.

    Raises:
        QADError: as in ``ActivationQuantizers.calibrating``, or the checkpoint has another precision than the job.
    """
    result, model = QuantizedLayers(), job.config.student
    stored = stored_dtypes(model.checkpoint)
    observed, quantized = Stream(job, calibration), Stream(job, validation)
    second = Stream(job, calibration if needs_moments(job.config) else [])
    layers = SingleLayers(model_config(job.config, job.args, model))
    for index in _indices(job, layers, "student"):
        layer = _load(layers, index, model.checkpoint)
        wrapped = layers.wrap(layer)  # converts it to the precision of the job
        dtypes = weight_dtypes(layer, stored)
        _check_precision(dtypes, stored, model)
        _quantize_layer(job, layer, wrapped, observed, second, quantized)
        result.weights |= dtypes.keys()
        result.quantizers |= {f"{index}.{name}": value for name, value in quantizers_to_save(layer).items()}
        del layer, wrapped  # before the next one is built
    return result


def needs_moments(config: JobConfig) -> bool:
    """Whether scales of some weights depend on the second moments of their inputs."""
    return any(setting.needs_moments for setting in config.scales.values())


def _quantize_layer(
    job, layer: torch.nn.Module, wrapped: torch.nn.Module, observed: Stream, second: Stream, quantized: Stream
) -> None:
    """Calibrate a layer, and quantize it if there is a validation.

    Args:
        observed: the pass with unquantized inputs, which sets the amaxes.
        second: the pass with quantized inputs, whose second moments set scales; without microbatches if none need it.
    """
    activations, weights = job.quantize_activations([layer]), job.quantize_weights([layer])
    weights.initialize_scales()
    with activations.calibrating():
        _observe(wrapped, layer, observed)
    if second.batches:
        moments = job.input_moments([layer], weights)
        with moments.collecting():
            _observe(wrapped, layer, second)
        weights.initialize_from_inputs(moments)
    if quantized.batches:
        weights.quantize_()
        _run_quantized(job, wrapped, layer.post_process, quantized)


def _observe(wrapped: torch.nn.Module, layer: torch.nn.Module, stream: Stream) -> None:
    """Advance the microbatches by a layer; after the last one, show the output layer's quantizer its input."""
    stream.advance(wrapped)
    if layer.post_process:
        for state in stream.states:
            ModelOutput(state.to(torch.cuda.current_device()), layer).hidden()


def _run_quantized(job, wrapped: torch.nn.Module, is_last: bool, quantized: Stream) -> None:
    """Advance the validation by a quantized layer; the last one gives its metrics to the job's loss."""
    if not is_last:
        return quantized.advance(wrapped)
    outputs = quantized.outputs(wrapped, hidden=job.config.output_mode.fused)
    for batch, output in zip(quantized.batches, outputs, strict=True):
        if (teacher := batch.teacher_output) is not None:
            batch.teacher_output = ModelOutput(teacher.tensor.to(output.device), teacher.model)
        job.loss(batch, wrapped, output)


def _indices(job, layers: SingleLayers, role: str) -> Iterator[int]:
    """Yield the index of each layer in turn. Frees the previous one, to which the caller has no reference any more."""
    for index in tqdm(range(len(layers)), unit="layer", desc=role, disable=None if is_rank0() else True):
        job.events.phase(f"layer {index} of the {role}", is_long=True)
        yield index
        gc.collect()  # modules refer to each other


def _load(layers: SingleLayers, index: int, checkpoint: str) -> torch.nn.Module:
    layer = layers.build(index)
    load_weights([layer], checkpoint, is_whole=False)
    return freeze(layer)


def _check_precision(dtypes: dict[str, torch.dtype], stored: dict[str, torch.dtype], model: ModelConfig) -> None:
    """Check that the checkpoint's weights, which become those of the run, have the precision of the job."""
    if different := sorted(name for name, dtype in dtypes.items() if stored[name] != dtype):
        name = different[0]
        raise QADError(
            f"{model.checkpoint}: {name} is {stored[name]}, but the job computes in {dtypes[name]}. "
            "--qad-ptq-sequential keeps the stored weights, so both must be equal. Import the model in the precision "
            "of the job (megatron-qad import --dtype), or leave out --qad-ptq-sequential."
        )
