"""Post-training quantization (``--qad-ptq``): calibrates, saves and validates a frozen model, without training it.

The job holds the student's weights and, if it validates, the teacher's. It has no gradients, no optimizer and no DDP
wrapper, so that a weight takes 2 bytes instead of the 18 of a training job (with BF16 weights and without sharding).
The checkpoint holds the unquantized weights and the amaxes, as that of a training job before its first update does. The
exporter quantizes the weights. With ``--qad-ptq-sequential`` the job holds one layer at a time (``layer_by_layer``).
"""

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.utils import get_model_config
from megatron.training import get_wandb_writer
from megatron.training import training as megatron_loop
from megatron.training.initialize import initialize_megatron, set_jit_fusion_options

from megatron_qad.config.job_config import JobConfig
from megatron_qad.engine.run_directory.iterations import iteration_dir
from megatron_qad.engine.run_directory.linked_weights import LinkedWeights
from megatron_qad.formats.format_registry import FORMATS, KV_CACHE_FORMATS
from megatron_qad.models.builder import QADModelConfig, build_chunks
from megatron_qad.training.batch import Batch, num_calibration_batches
from megatron_qad.training.layer_by_layer import needs_moments, quantize_layers, run_teacher

ITERATION = 1
"""Iteration of a PTQ job's checkpoint and validation."""


def run_ptq(job, model_config: QADModelConfig, forward_step: Callable) -> None:
    """Calibrate the student on training data, save it and validate it. Replaces Megatron's ``pretrain``.

    Args:
        job: the ``QADJob`` of a configuration with ``--qad-ptq``, inside of ``job.loop.running()``.
        model_config: ``job.model_config(...)``; its hook loads the student.
        forward_step: runs the student on one microbatch, as for ``pretrain``.

    Raises:
        QADError: as in ``ActivationQuantizers.calibrating``, or the save failed.
    """
    args = job.args
    initialize_megatron()
    set_jit_fusion_options(tp_size=args.tensor_model_parallel_size)
    args.iteration = args.curr_iteration = 0
    if job.config.options.qad_ptq_sequential:
        _run_layers(job)
    else:
        _run_model(job, build_chunks(model_config), forward_step)
    if writer := get_wandb_writer():
        writer.finish()
    megatron_loop.maybe_finalize_async_save(blocking=True, terminate=True)


def _run_model(job, model: list[torch.nn.Module], forward_step: Callable) -> None:
    args = job.args
    train, valid = data_iterators(job.datasets_provider, len(model))
    shape = {name: getattr(args, name) for name in ("seq_length", "micro_batch_size", "decoder_seq_length")}
    job.calibration.calibrate(train, shape, model)
    _save(job, model, train)
    if args.do_valid:
        job.loss.begin_step(ITERATION)
        megatron_loop.evaluate_and_print_results(
            f"iteration {ITERATION} on validation set",
            forward_step,
            valid,
            model,
            ITERATION,
            None,
            get_model_config(model[0]),
            verbose=True,
            non_loss_data_func=job.evaluated,
        )


def _run_layers(job) -> None:
    """Do the same as ``_run_model`` with one layer in memory at a time. The checkpoint shares the student's weights."""
    args, student = job.args, job.config.student.checkpoint
    job.begin()
    job.describe(resumes=False)
    job.saves.install()
    job.loop.install_saves()
    train, valid = data_iterators(job.datasets_provider, num_chunks=1)
    calibration = _read_calibration(job, train) if _needs_calibration(job.config) else []
    validation = _read_validation(job, valid) if args.do_valid else []
    if validation and job.config.runs_teacher:
        run_teacher(job, validation)
    layers = quantize_layers(job, calibration, validation)
    job.saves.weights = LinkedWeights(iteration_dir(student), layers.weights)
    _save(job, [_Quantizers(layers.quantizers)], train)
    if validation:
        job.evaluated(model=None)


def _needs_calibration(config: JobConfig) -> bool:
    has_inputs = any(FORMATS[name].input is not None for name in config.formats.values())
    kv_format = KV_CACHE_FORMATS[config.policy.kv_cache]
    return has_inputs or (kv_format is not None and kv_format.constant_amax is None) or needs_moments(config)


def _read_calibration(job, iterator) -> list[Batch]:
    """Read the microbatches of the calibration on this rank."""
    args = job.args
    num_batches = num_calibration_batches(job.config.options.qad_calibration_samples, args.micro_batch_size)
    return job.reader.read(iterator, num_batches, args.micro_batch_size, args.seq_length)


def _read_validation(job, iterator) -> list[Batch]:
    """Read the microbatches of one evaluation on this rank."""
    args = job.args
    per_iteration = args.eval_global_batch_size // (args.eval_micro_batch_size * args.data_parallel_size)
    return job.reader.read(iterator, args.eval_iters * per_iteration, args.eval_micro_batch_size, args.seq_length)


class _Quantizers(torch.nn.Module):
    """Stands for a model whose layers are freed, with the sharded state dict of its quantizers."""

    def __init__(self, sharded: dict):
        super().__init__()
        self._sharded = sharded

    def sharded_state_dict(self, **kwargs) -> dict:
        return self._sharded


def _save(job, model: list[torch.nn.Module], train_iterator) -> None:
    """Save the model as iteration 1, if the job saves, through the functions by which Megatron's loop saves."""
    args = job.args
    args.iteration, args.consumed_train_samples = ITERATION, args.global_batch_size
    if args.save is None:
        return
    megatron_loop.save_checkpoint(
        ITERATION,
        model,
        optimizer=None,
        opt_param_scheduler=None,
        num_floating_point_operations_so_far=0,
        train_data_iterator=train_iterator,
        preprocess_common_state_dict_fn=megatron_loop.preprocess_common_state_dict,
    )


def data_iterators(provider, num_chunks: int) -> tuple:
    """Return Megatron's iterators of the training and validation data, each a list if there are virtual stages."""
    if num_chunks == 1:
        return megatron_loop.build_train_valid_test_data_iterators(provider)[:2]
    stages = []
    for stage in range(num_chunks):
        stage_provider = partial(provider, vp_stage=stage)
        stage_provider.is_distributed = provider.is_distributed
        stages.append(megatron_loop.build_train_valid_test_data_iterators(stage_provider))
    train, valid, _ = map(list, zip(*stages, strict=True))
    return train, valid
