"""Fixes for bugs in Megatron and its wheel; each has a row in ``patches``."""

import importlib.util
import queue
from collections.abc import Callable
from types import SimpleNamespace

import torch

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.patches import replace


def use_compiled_dataset_helpers() -> None:
    """Prevent Megatron from compiling its dataset helpers at start-up.

    The wheel contains the compiled helpers but not the Makefile that ``compile_helpers`` runs, so every start would
    fail.
    """
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        raise QADError("megatron-core has no compiled dataset helpers (helpers_cpp). Install it from its wheel.")
    replace("megatron.core.datasets.utils:compile_helpers", lambda _: lambda: None)


def save_checkpoints_in_this_process() -> None:
    """Prevent synchronous checkpoint saves from starting a process.

    Megatron passes the results of a save through a queue in a manager process, even if the save is synchronous. That
    process imports the entry point again (half a gigabyte, ten seconds on each rank) and outlives a killed job. Within
    one process a plain queue is enough. Not for ``--async-save``.
    """
    replace("megatron.core.dist_checkpointing.strategies.filesystem_async:_results_queue", lambda _: queue.Queue())


def load_reshardable_state_of_torch_adam() -> None:
    """Let ``--dist-ckpt-optim-fully-reshardable`` load the state that it saved with torch's AdamW.

    Its checkpoints store the step counter separately from the parameters' state (``adamw`` reads it there), but loading
    looks for it among each parameter's tensors, where Transformer Engine's optimizer has none, and fails. In that code
    None means "not here".
    """

    def wrap(load):
        def without_step(self, model_param, tensors):
            return load(self, model_param, {"step": None} | tensors)

        return without_step

    target = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states"
    replace(target, wrap)


def dispatch_tokens_on_cpu() -> None:
    """Convert the split sizes of expert parallelism's all-to-all if tensors are on the CPU.

    Megatron copies the sizes from the GPU as numpy arrays. A tensor that is not on a GPU stays a tensor, which the
    collective does not accept as a list of sizes.
    """

    def wrap(move):
        def moved(tensor, as_numpy=False, record_stream=False):
            tensor = move(tensor, as_numpy, record_stream)
            return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

        return moved

    for module in ("moe_utils", "token_dispatcher"):
        replace(f"megatron.core.transformer.moe.{module}:maybe_move_tensor_to_cpu", wrap)


def pack_mamba_rows_without_te(partitioned_indices: Callable) -> None:
    """Let Mamba layers process packed rows under context parallelism without Transformer Engine or without a GPU.

    ``partitioned_indices`` replaces Transformer Engine's function, which assigns tokens to ranks.
    """
    module = "megatron.core.ssm.mamba_context_parallel"
    replace(f"{module}:tex", lambda _: SimpleNamespace(thd_get_partitioned_indices=partitioned_indices))
    replace(f"{module}:is_te_min_version", lambda _: lambda version: True)
