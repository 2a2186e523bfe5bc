"""Runs Megatron, which requires CUDA in many places, on the CPU over gloo.

``install()`` replaces the functions of ``torch.cuda`` that Megatron calls and maps the device "cuda" to "cpu", so that
the same training loop, schedules, optimizer and checkpoints run without a GPU. ``engine.init_runtime`` installs it
before ``megatron`` is imported, and only on a machine without a GPU. It does not change any arithmetic. Not supported:
CUDA graphs, overlapping streams, memory pools, profilers."""

import contextlib
import functools
import os
import resource
import types

import torch
from torch.overrides import TorchFunctionMode

from megatron_qad.engine.cpu import collectives
from megatron_qad.engine.patches import replace

_CPU = torch.device("cpu")


def install() -> None:
    """Replace CUDA by the CPU in this process until it ends. Idempotent."""
    if getattr(install, "done", False):
        return
    install.done = True
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # Megatron compiles its fusions, which takes minutes on a CPU
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron refuses sequence parallelism without it
    _replace_cuda_functions()
    collectives.install()
    _CudaMeansCpu().__enter__()
    _cover_backward_passes()


def _is_cuda(device) -> bool:
    if isinstance(device, bool):
        return False
    if isinstance(device, int):
        return True  # torch reads a bare index as "cuda:index"
    if isinstance(device, str):
        return device.split(":")[0] == "cuda"
    return isinstance(device, torch.device) and device.type == "cuda"


class _CudaMeansCpu(TorchFunctionMode):
    """Redirects every torch function that receives the device "cuda" to the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # DistributedOptimizer sorts parameters by this string.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.pin_memory:
            return args[0]
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}  # pinning needs the CUDA driver
        if func is torch.Tensor.to and len(args) > 1 and not isinstance(args[1], bool) and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


def _cover_backward_passes() -> None:
    """Activate the mode in backward passes, too.

    torch suspends a function mode while it handles a function, and backward is one. Without this, the backward passes
    of Megatron's collectives, and recomputed forward passes, would request CUDA.
    """

    def wrap(run):
        @functools.wraps(run)
        def with_mode(*args, **kwargs):
            with _CudaMeansCpu():
                return run(*args, **kwargs)

        return with_mode

    replace("torch.autograd:_engine_run_backward", wrap)


class _Stream:
    """A stream whose work is always complete."""

    cuda_stream = 0
    device = _CPU

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True

    def record_event(self, event=None):
        return event or _Event()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return None


class _Event:
    """An event that is always complete."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def query(self):
        return True

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 0.0


def _peak_rss_bytes(device=None) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _memory_stats(device=None) -> dict:
    rss = _peak_rss_bytes()
    kinds = ("allocated_bytes", "reserved_bytes", "active_bytes", "allocation", "segment")
    stats = {f"{kind}.all.{when}": rss for kind in kinds for when in ("current", "peak")}
    return {**stats, "num_alloc_retries": 0, "num_ooms": 0}


def _replace_cuda_functions() -> None:
    # Dynamo keys its rules by function object, so no two names may share a replacement.
    def does_nothing():
        return lambda *args, **kwargs: None

    def returns(value):
        return lambda *args, **kwargs: value

    cpu = types.SimpleNamespace(
        name="cpu", major=8, minor=0, multi_processor_count=os.cpu_count(), total_memory=_physical_memory_bytes()
    )
    stream = _Stream()
    replacements = {
        "is_available": returns(True),
        "is_initialized": returns(True),
        "_is_compiled": returns(True),
        "_lazy_init": does_nothing(),
        "init": does_nothing(),
        "device_count": returns(1),
        "current_device": returns(0),
        "set_device": does_nothing(),
        "device": lambda *args, **kwargs: contextlib.nullcontext(),
        "get_device_properties": returns(cpu),
        "get_device_capability": returns((cpu.major, cpu.minor)),
        "get_device_name": returns(cpu.name),
        "synchronize": does_nothing(),
        "empty_cache": does_nothing(),
        "ipc_collect": does_nothing(),
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": returns(stream),
        "default_stream": returns(stream),
        "set_stream": does_nothing(),
        "stream": lambda stream=None: contextlib.nullcontext(),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "manual_seed_all": lambda seed: torch.default_generator.manual_seed(seed),
        "get_rng_state": lambda device=None: torch.default_generator.get_state(),
        "set_rng_state": lambda state, device=None: torch.default_generator.set_state(state),
        "default_generators": (torch.default_generator,),
        "is_current_stream_capturing": returns(False),
        "memory_allocated": lambda device=None: _peak_rss_bytes(),
        "memory_reserved": lambda device=None: _peak_rss_bytes(),
        "max_memory_allocated": lambda device=None: _peak_rss_bytes(),
        "max_memory_reserved": lambda device=None: _peak_rss_bytes(),
        "reset_peak_memory_stats": does_nothing(),
        "memory_stats": _memory_stats,
        "mem_get_info": returns((_physical_memory_bytes() // 2, _physical_memory_bytes())),
        "is_bf16_supported": returns(True),
    }
    for name, replacement in replacements.items():
        _replace_with(f"torch.cuda:{name}", replacement)
    _replace_with("torch.accelerator:is_available", returns(False))  # prevents the data loader from pinning memory
    for name in ("get_rng_state", "set_rng_state"):
        _replace_with(f"torch.cuda.random:{name}", replacements[name])
    for name in ("range_push", "range_pop", "mark"):
        _replace_with(f"torch.cuda.nvtx:{name}", does_nothing())


def _replace_with(target: str, replacement) -> None:
    replace(target, lambda _: replacement)


def _physical_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
