"""Post-training quantization (``--qad-ptq``): calibrates, saves and validates a frozen model, without training it.

The job holds the student's weights and, if it validates, the teacher's. It has no gradients, no optimizer and no DDP
wrapper, so that a weight takes 2 bytes instead of the 18 of a training job (with BF16 weights and without sharding).
The checkpoint holds the unquantized weights and the amaxes, as that of a training job before its first update does. The
exporter quantizes the weights. ``sequential_ptq`` calibrates models that do not fit into memory.
"""

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.utils import get_model_config
from megatron.training import get_wandb_writer
from megatron.training import training as megatron_loop
from megatron.training.initialize import initialize_megatron, set_jit_fusion_options

from megatron_qad.models.builder import QADModelConfig, build_chunks

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
    model = build_chunks(model_config)
    args.iteration = args.curr_iteration = 0
    args.num_floating_point_operations_so_far = 0
    train, valid = _data_iterators(job.datasets_provider, len(model))
    job.calibration.calibrate(train, training_shape(args), model)
    args.iteration, args.consumed_train_samples = ITERATION, args.global_batch_size
    if args.save is not None:
        save_model(model, train)
    if args.do_valid:
        _validate(job, model, valid, forward_step)
    finish()


def training_shape(args) -> dict:
    """Return the shape arguments of a schedule for microbatches of the training data."""
    return {name: getattr(args, name) for name in ("seq_length", "micro_batch_size", "decoder_seq_length")}


def save_model(model: list[torch.nn.Module], train_iterator=None) -> None:
    """Save a model as iteration 1, through the functions by which Megatron's loop saves. Collective."""
    megatron_loop.save_checkpoint(
        ITERATION,
        model,
        optimizer=None,
        opt_param_scheduler=None,
        num_floating_point_operations_so_far=0,
        train_data_iterator=train_iterator,
        preprocess_common_state_dict_fn=megatron_loop.preprocess_common_state_dict,
    )


def finish() -> None:
    """End the loggers and wait for background saves, as ``pretrain`` does at its end."""
    if writer := get_wandb_writer():
        writer.finish()
    megatron_loop.maybe_finalize_async_save(blocking=True, terminate=True)


def _data_iterators(provider, num_chunks: int) -> tuple:
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


def _validate(job, model: list[torch.nn.Module], iterator, forward_step: Callable) -> None:
    job.loss.begin_step(ITERATION)
    megatron_loop.evaluate_and_print_results(
        f"iteration {ITERATION} on validation set",
        forward_step,
        iterator,
        model,
        ITERATION,
        None,
        get_model_config(model[0]),
        verbose=True,
        non_loss_data_func=job.evaluated,
    )
