"""The table of everything that megatron_qad replaces in Megatron, torch and other packages.

``replace`` refuses an attribute without a row, and the package replaces attributes only with ``replace``. A test
compares every row with the installed packages and fails if a new version has changed the replaced code.
``docs/patches.md`` shows the table. Official hooks (Megatron's ``finalize_model_grads_func``, modelopt's quantization
backends and module registry, transformers' attention interface) are not patches and have no rows.
"""

import contextlib
import hashlib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Patch:
    """One row of the table: attributes of a module or class that are replaced."""

    owner: str
    """Module, or ``module:Class``, whose attributes are replaced."""
    names: tuple[str, ...]
    """Names of the replaced attributes."""
    package: str
    """Distribution on PyPI that the module belongs to."""
    version: str
    """Version of the package against which the row was checked."""
    why: str
    where: str
    """File that replaces the attributes."""
    until: str
    """When the row can be removed."""
    sources: tuple[str, ...]
    """The first 12 digits of the SHA-256 of each attribute's source, or its type if it has no Python source."""
    issue: str = ""
    """Upstream issue, if one is known."""


_MEGATRON, _TORCH, _TENSORBOARD = ("megatron-core", "0.19.2"), ("torch", "2.11.0"), ("tensorboard", "2.21")
_CUDA_CALLS = (
    *("is_available", "is_initialized", "_is_compiled", "_lazy_init", "init", "device_count", "current_device"),
    *("set_device", "device", "get_device_properties", "get_device_capability", "get_device_name", "synchronize"),
    *("empty_cache", "ipc_collect", "Stream", "Event", "current_stream", "default_stream", "set_stream", "stream"),
    *("manual_seed", "manual_seed_all", "get_rng_state", "set_rng_state", "default_generators"),
    *("is_current_stream_capturing", "memory_allocated", "memory_reserved", "max_memory_allocated"),
    *("max_memory_reserved", "reset_peak_memory_stats", "memory_stats", "mem_get_info", "is_bf16_supported"),
)
_CUDA_SOURCES = (
    *("b91a896857c1", "0f623fc044a8", "36f8251a1fd5", "f6316f9c5c9b", "85035f109983", "c7fd457e1134", "6e9804168a5c"),
    *("86c6d0bf4222", "892054019b06", "cb006011f5d1", "6809539b0a67", "6f35f689a571", "7055e6143ffe", "bce971e6854f"),
    *("555aacca1155", "f5b9547b4660", "f5fe051e2c60", "ca5387f64ee1", "b0a2135268c6", "6f7a1ab4ffc3", "a701c622b6f5"),
    *("a71497712eba", "e9489253dd7c", "1190f97901d7", "2aaed350f20b", "tuple", "46ad9fe4332b", "0442d2549a61"),
    *("de803da5e53c", "7d74e1261dc1", "60af9cdf5dca", "766ce5a529a5", "9f51df170746", "f9ea28f9e6d1", "dd9ffd146f5f"),
)

PATCHES: tuple[Patch, ...] = (
    Patch(
        "megatron.training.training",
        ("get_forward_backward_func", "train_step", "save_checkpoint", "maybe_finalize_async_save"),
        *_MEGATRON,
        why="Megatron's loop has no callbacks; these four functions report a job's events (the last one only with "
        "--async-save)",
        where="engine/loop.py",
        until="Megatron's loop accepts callbacks",
        sources=("9d8e0a75be40", "68989d425b23", "b652984ca8c8", "403a01e56d5a"),
    ),
    Patch(
        "megatron.training.global_vars",
        ("_set_tensorboard_writer", "_set_wandb_writer"),
        *_MEGATRON,
        why="a full disk or an unreachable server of a logger ends the job; wandb and TensorBoard get other scalars",
        where="engine/loggers.py",
        until="Megatron accepts writers from its caller",
        sources=("9eec040faaed", "45900feb85c3"),
    ),
    Patch(
        "megatron.training.wandb_utils",
        ("on_save_checkpoint_success",),
        *_MEGATRON,
        why="logs each checkpoint to wandb and writes a file next to it; an error there ends the job",
        where="engine/loggers.py",
        until="Megatron accepts writers from its caller",
        sources=("83e5396da7ae",),
    ),
    Patch(
        "megatron.training.training",
        ("append_to_progress_log",),
        *_MEGATRON,
        why="a full disk of the progress log ends the job",
        where="engine/loggers.py",
        until="an error of the progress log does not end a job",
        sources=("de6d4e4f3874",),
    ),
    Patch(
        "megatron.training.checkpointing",
        ("append_to_progress_log",),
        *_MEGATRON,
        why="the same function, as imported by this module",
        where="engine/loggers.py",
        until="an error of the progress log does not end a job",
        sources=("de6d4e4f3874",),
    ),
    Patch(
        "megatron.core.dist_checkpointing",
        ("save",),
        *_MEGATRON,
        why="a checkpoint becomes visible before it is complete, and nothing checks it",
        where="engine/run_directory/atomic_checkpoint.py",
        until="Megatron writes to a temporary directory, adds checksums and renames it",
        sources=("e9626ecdf679",),
    ),
    Patch(
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
        ("_results_queue",),
        *_MEGATRON,
        why="a synchronous save starts a manager process of 0.5 GB, which outlives a killed job",
        where="engine/megatron_fixes.py",
        until="synchronous saves do not start a process",
        sources=("NoneType",),
    ),
    Patch(
        "megatron.core.datasets.utils",
        ("compile_helpers",),
        *_MEGATRON,
        why="runs make at every start; the wheel has no Makefile and contains the helpers already compiled",
        where="engine/megatron_fixes.py",
        until="compile_helpers does nothing if the compiled module exists",
        sources=("84029a50ae8c",),
    ),
    Patch(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer",
        ("_set_main_param_and_optimizer_states",),
        *_MEGATRON,
        why="with torch's AdamW, --dist-ckpt-optim-fully-reshardable cannot load its own checkpoints",
        where="engine/megatron_fixes.py",
        until="loading reads the step counter from the place where saving stores it",
        sources=("40cab7846597",),
    ),
    Patch(
        "megatron.core.transformer.moe.moe_utils",
        ("maybe_move_tensor_to_cpu",),
        *_MEGATRON,
        why="for CPU tensors, the all-to-all of expert parallelism receives a tensor instead of a list of sizes",
        where="engine/megatron_fixes.py",
        until="the function also converts CPU tensors",
        sources=("8fc5847a887d",),
    ),
    Patch(
        "megatron.core.transformer.moe.token_dispatcher",
        ("maybe_move_tensor_to_cpu",),
        *_MEGATRON,
        why="the same function, as imported by this module",
        where="engine/megatron_fixes.py",
        until="the function also converts CPU tensors",
        sources=("8fc5847a887d",),
    ),
    Patch(
        "megatron.core.ssm.mamba_context_parallel",
        ("tex", "is_te_min_version"),
        *_MEGATRON,
        why="packed rows with context parallelism need Transformer Engine's assignment of tokens to ranks",
        where="engine/megatron_fixes.py",
        until="Megatron has this function without Transformer Engine",
        sources=("NoneType", "95220642e70b"),
    ),
    Patch(
        "torch.optim",
        ("AdamW",),
        *_TORCH,
        why="creates its state at the first step and keeps step counters as tensors, so Megatron's distributed "
        "optimizer cannot resume it (replaced only if Transformer Engine is not installed)",
        where="engine/adamw.py",
        until="Megatron's distributed optimizer can resume torch's AdamW",
        sources=("2ae5744ac85c",),
    ),
    Patch(
        "torch.distributed.checkpoint.filesystem",
        ("pickle", "FileSystem"),
        *_TORCH,
        why="reading the metadata of an untrusted checkpoint can run code that the file names; links in it lead to "
        "other files, and errors in an object do not name its file",
        where="engine/run_directory/restricted_unpickling.py",
        until="torch reads the metadata without pickle, opens no link and names the file",
        sources=("module", "11a93228d2e9"),
    ),
    Patch(
        "torch",
        ("load",),
        *_TORCH,
        why="for a file with another class, the error advises to let it run code (weights_only=False)",
        where="engine/run_directory/restricted_unpickling.py",
        until="torch's error names the file and gives no such advice",
        sources=("eabc8a404157",),
    ),
    Patch(
        "torch.distributed.elastic.multiprocessing.api:PContext",
        ("close",),
        *_TORCH,
        why="torchrun waits 30 seconds for the other ranks after one has failed; here it waits 5",
        where="launch/agent.py",
        until="torchrun has a flag for this time",
        sources=("b77c260c4568",),
    ),
    Patch(
        "torch.distributed",
        ("TCPStore",),
        *_TORCH,
        why="torchrun's stores listen on all network interfaces (replaced only with QAD_INTERFACE)",
        where="launch/agent.py",
        until="torchrun has a flag for the listening address",
        sources=("pybind11_type",),
    ),
    Patch(
        "tensorboard.summary.writer.event_file_writer",
        ("EventFileWriter", "_AsyncWriter"),
        *_TENSORBOARD,
        why="not replaced, but created without its constructor around a file whose errors do not end the job",
        where="engine/event_writer.py",
        until="TensorBoard's writer tolerates a full disk",
        sources=("394bcc0d831a", "f5c4e96b398f"),
    ),
    Patch(
        "transformers.cache_utils",
        ("DYNAMIC_LAYER_TYPE_MAPPING",),
        "transformers",
        "5.14",
        why="one entry is added: transformers has no cache class for the MLP layers of Nemotron-H, which need none",
        where="data/local_generation.py",
        until="transformers has the entry",
        sources=("dict",),
    ),
    Patch(
        "transformers.models.nemotron_h.modeling_nemotron_h:NemotronHMamba2Mixer",
        ("torch_forward",),
        "transformers",
        "5.14",
        why="without GPU kernels transformers joins chunks wrongly and limits time steps by time_step_min; replaced in "
        "the layers of the models that are loaded here",
        where="engine/cpu/transformers_mamba.py",
        until="tests/unit/engine/test_transformers_mamba.py finds that transformers is right",
        sources=("d80889d39bc7",),
    ),
    # The CPU backend.
    Patch(
        "torch.cuda",
        _CUDA_CALLS,
        *_TORCH,
        why="Megatron always calls torch.cuda; the replacements return plausible values without a GPU",
        where="engine/cpu/device.py",
        until="Megatron runs on torch.accelerator",
        sources=_CUDA_SOURCES,
    ),
    Patch(
        "torch.cuda.random",
        ("get_rng_state", "set_rng_state"),
        *_TORCH,
        why="as torch.cuda above",
        where="engine/cpu/device.py",
        until="Megatron runs on torch.accelerator",
        sources=("1190f97901d7", "2aaed350f20b"),
    ),
    Patch(
        "torch.cuda.nvtx",
        ("range_push", "range_pop", "mark"),
        *_TORCH,
        why="as torch.cuda above",
        where="engine/cpu/device.py",
        until="Megatron runs on torch.accelerator",
        sources=("8d3e0eb4b342", "1843ba3dbe36", "8fee73085056"),
    ),
    Patch(
        "torch.accelerator",
        ("is_available",),
        *_TORCH,
        why="otherwise the data loader pins memory",
        where="engine/cpu/device.py",
        until="Megatron runs on torch.accelerator",
        sources=("354edcaa77d5",),
    ),
    Patch(
        "torch.autograd",
        ("_engine_run_backward",),
        *_TORCH,
        why='"cuda" must mean "cpu" in backward passes too, where torch suspends a function mode',
        where="engine/cpu/device.py",
        until="Megatron runs on torch.accelerator",
        sources=("0615005d3166",),
    ),
    Patch(
        "torch.distributed",
        ("init_process_group", "all_gather", "reduce_scatter"),
        *_TORCH,
        why="gloo replaces nccl, and lacks gathers and scatters of unequal sizes, which experts need",
        where="engine/cpu/collectives.py",
        until="gloo supports unequal sizes",
        sources=("b26b016e14cc", "42f0fb24f8e8", "cd04be9db066"),
    ),
    Patch(
        "torch.ops:aten",
        ("mm", "bmm", "addmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu_backward"),
        *_TORCH,
        why="on CPUs without AVX-512 torch multiplies BF16 in a plain loop; our kernels are registered with "
        "torch.library",
        where="engine/cpu/speedups/bf16_matmul_fallback.py",
        until="oneDNN has BF16 GEMMs for AVX2",
        sources=("OpOverloadPacket",) * 5,
    ),
)


@dataclass(frozen=True)
class StandIn:
    """A module of megatron_qad that is imported under the name of another package."""

    module: str
    why: str
    where: str
    until: str


STAND_INS: tuple[StandIn, ...] = (
    StandIn(
        "mamba_ssm",
        "Megatron's Mamba mixer subclasses what it imports; without a GPU or the package it gets a version in torch",
        "engine/cpu/mamba_packages.py",
        "Megatron's mixer runs on torch's operations",
    ),
    StandIn(
        "causal_conv1d",
        "as mamba_ssm",
        "engine/cpu/mamba_packages.py",
        "Megatron's mixer runs on torch's operations",
    ),
    StandIn(
        "transformer_engine",
        "hidden without a GPU: Megatron uses its kernels if it can import it, and they refuse CPU tensors",
        "engine/capabilities.py",
        "Transformer Engine supports CPU tensors, or Megatron uses it only with a flag",
    ),
)


def replace(target: str, make: Callable[[Any], Any]) -> None:
    """Replace an attribute that has a row in the table by ``make(upstream)``.

    ``upstream`` is the original attribute, also in a second call, so each job of a process can install its replacement.
    ``target`` is ``module:name`` or ``module:Class.name``. Without a row for it, LookupError is raised. Example::

        from megatron_qad.engine.patches import replace, restore
        replace("torch.optim:AdamW", lambda upstream: type("MyAdamW", (upstream,), {}))
        restore("torch.optim:AdamW")
    """
    owner, _, name = target.replace(":", ".").rpartition(".")
    if not any(owner == patch.owner.replace(":", ".") and name in patch.names for patch in PATCHES):
        raise LookupError(f"{target} has no row in engine/patches.py")
    holder = owner_of(target.rpartition("." if "." in target.partition(":")[2] else ":")[0])
    upstream = upstream_of(getattr(holder, name))
    new = make(upstream)
    with contextlib.suppress(AttributeError, TypeError):  # None, tuples
        setattr(new, _MARK, (new, upstream))
    setattr(holder, name, new)


def restore(target: str) -> None:
    """Restore the original of a replaced attribute."""
    replace(target, lambda upstream: upstream)


def upstream_of(value: Any) -> Any:
    """Return the original that ``value`` replaces; ``value`` itself if it is not a replacement."""
    new, upstream = getattr(value, _MARK, (None, None))
    return upstream if new is value else value  # functools.wraps copies the mark to another package's wrapper


_MARK = "_megatron_qad_replaces"


def owner_of(name: str) -> Any:
    """Import and return the module or class that the ``owner`` of a row names."""
    module_name, _, attribute = name.partition(":")
    module = importlib.import_module(module_name)
    return getattr(module, attribute) if attribute else module


def source_of(owner: Any, name: str) -> str:
    """Return the ``Patch.sources`` entry of an attribute: 12 digits of its source's SHA-256, or its type."""
    if not hasattr(owner, name):
        return "absent"
    value = inspect.unwrap(upstream_of(getattr(owner, name)))
    try:
        source = inspect.getsource(value) if inspect.isfunction(value) or inspect.isclass(value) else None
    except OSError:  # compiled
        source = None
    return type(value).__name__ if source is None else hashlib.sha256(source.encode()).hexdigest()[:12]
