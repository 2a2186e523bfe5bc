"""Fixes for bugs of Megatron and its wheel that a job would run into; each has a row in ``patches``."""

import importlib.util
import queue
from collections.abc import Callable
from types import SimpleNamespace

import torch

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.patches import replace


def use_compiled_dataset_helpers() -> None:
    """Keep Megatron from compiling its dataset helpers at start-up.

    The wheel ships them compiled but without the Makefile that ``compile_helpers`` runs, so that every start would
    fail.
    """
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        raise QADError("megatron-core has no compiled dataset helpers (helpers_cpp); install it from its wheel")
    replace("megatron.core.datasets.utils:compile_helpers", lambda _: lambda: None)


def save_checkpoints_in_this_process() -> None:
    """Keep synchronous checkpoint saves from starting a process.

    Megatron hands the results of a save over a queue that a manager process serves, also where nothing is asynchronous.
    That process imports the entry point again (half a gigabyte, ten seconds a rank) and outlives a job that is killed.
    Within one process a plain queue does the same. Not for ``--async-save``.
    """
    replace("megatron.core.dist_checkpointing.strategies.filesystem_async:_results_queue", lambda _: queue.Queue())


def load_reshardable_state_of_torch_adam() -> None:
    """Let ``--dist-ckpt-optim-fully-reshardable`` load what it saved with torch's AdamW.

    Its checkpoints hold the step counter apart from the parameters' state (``adamw`` takes it from there), but loading
    looks for it among each parameter's tensors, where Transformer Engine's optimizer has none, and fails. None stands
    for "not here" in that code.
    """

    def wrap(load):
        def without_step(self, model_param, tensors):
            return load(self, model_param, {"step": None} | tensors)

        return without_step

    target = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states"
    replace(target, wrap)


def dispatch_tokens_on_cpu() -> None:
    """Let the all-to-all of expert parallelism find its split sizes where tensors live on the CPU.

    Megatron brings them from the GPU as numpy arrays; what is not on a GPU it leaves a tensor, which the collective
    then refuses as a list of sizes.
    """

    def wrap(move):
        def moved(tensor, as_numpy=False, record_stream=False):
            tensor = move(tensor, as_numpy, record_stream)
            return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

        return moved

    for module in ("moe_utils", "token_dispatcher"):
        replace(f"megatron.core.transformer.moe.{module}:maybe_move_tensor_to_cpu", wrap)


def pack_mamba_rows_without_te(partitioned_indices: Callable) -> None:
    """Let Mamba layers take packed rows under context parallelism where Transformer Engine's function, which says which
    tokens are whose, is missing or has no GPU to run on: ``partitioned_indices`` stands in its place."""
    module = "megatron.core.ssm.mamba_context_parallel"
    replace(f"{module}:tex", lambda _: SimpleNamespace(thd_get_partitioned_indices=partitioned_indices))
    replace(f"{module}:is_te_min_version", lambda _: lambda version: True)
