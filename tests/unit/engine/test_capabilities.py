"""The CPU backend is installed only without a GPU, and its replacements of CUDA functions work on the CPU."""

import json
import subprocess
import sys

import pytest
import torch

from megatron_qad.engine import QADError, capabilities, init_runtime


def run_in_new_process(code: str) -> dict:
    """Run ``code``, whose last line prints JSON, in a new process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


WITH_A_GPU = """
import json, sys, torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda index=0: "a GPU"
before = dict(vars(torch.cuda)), torch.distributed.init_process_group
import megatron_qad.engine as engine
from torch.overrides import _get_current_function_mode
machine = engine.init_runtime()
print(json.dumps({
    "device": machine.device, "backend": machine.backend, "kernels": machine.kernels, "report": machine.report(),
    "same": all(vars(torch.cuda)[name] is value for name, value in before[0].items()),
    "same_init": torch.distributed.init_process_group is before[1],
    "mode": str(_get_current_function_mode()),
    "installed": hasattr(sys.modules["megatron_qad.engine.cpu.device"].install, "done"),
}))
"""


def test_nothing_is_installed_with_a_gpu():
    state = run_in_new_process(WITH_A_GPU)
    assert state["device"] == "cuda" and state["backend"] == "nccl"
    assert "found a GPU" in state["report"]
    assert state["same"] and state["same_init"] and state["mode"] == "None" and not state["installed"]


IMPORT_ONLY = """
import json, torch
init, cuda = torch.distributed.init_process_group, torch.cuda.is_available
import megatron_qad.engine
from torch.overrides import _get_current_function_mode
print(json.dumps([torch.distributed.init_process_group is init, torch.cuda.is_available is cuda,
                  str(_get_current_function_mode())]))
"""


def test_importing_installs_nothing():
    assert run_in_new_process(IMPORT_ONLY) == [True, True, "None"]


needs_no_gpu = pytest.mark.skipif(capabilities().device != "cpu", reason="with a GPU the CPU backend is not installed")


@pytest.fixture(scope="module")
def machine():
    return init_runtime()


@needs_no_gpu
def test_report_gives_each_choice_and_its_reason(machine):
    assert (machine.device, machine.backend, machine.kernels) == ("cpu", "gloo", "torch")
    lines = machine.report().splitlines()
    assert len(lines) == 6
    assert "device cpu" in lines[0] and "found no GPU" in lines[0]
    assert "collectives gloo: nccl needs a GPU" in lines[1]
    assert "layer spec local" in lines[2] and "Transformer Engine" in lines[2]
    assert "kernels torch: triton needs a GPU" in lines[3]
    assert "BF16 products by " in lines[4]
    assert "mamba torch: " in lines[5]
    assert init_runtime() is machine  # a second call changes nothing


@needs_no_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0, torch.device("cuda"), torch.device("cuda", 3)])
def test_every_spelling_of_cuda_means_cpu(machine, device):
    assert torch.zeros(2, device=device).device.type == "cpu"
    assert torch.ones(2).to(device).device.type == "cpu"
    assert torch.ones(2).to(device, torch.bfloat16).dtype == torch.bfloat16
    assert torch.ones(2).to(device=device, dtype=torch.float16).dtype == torch.float16
    assert torch.nn.Linear(2, 2, device=device).weight.device.type == "cpu"
    assert torch.empty_like(torch.ones(2), device=device).device.type == "cpu"


@needs_no_gpu
def test_other_arguments_are_unchanged(machine):
    tensor = torch.ones(2)
    assert tensor.to("cpu") is tensor and tensor.cuda() is tensor
    assert tensor.to(torch.float64).dtype == torch.float64
    assert tensor.to(torch.ones(1, dtype=torch.int8)).dtype == torch.int8
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"
    assert tensor.pin_memory() is tensor and torch.zeros(2, pin_memory=True).device.type == "cpu"
    assert tensor.sum(0).item() == 2 and tensor.repeat(2).shape == (4,)


@needs_no_gpu
@pytest.mark.parametrize(
    "dtype, expected",
    [(torch.float32, "Float"), (torch.bfloat16, "BFloat16"), (torch.float16, "Half"), (torch.int64, "Long")],
)
def test_tensor_type_is_cuda(machine, dtype, expected):
    tensor = torch.zeros(2, dtype=dtype)
    assert tensor.type() == f"torch.cuda.{expected}Tensor"  # DistributedOptimizer sorts by it
    assert tensor.type(torch.float64).dtype == torch.float64
    assert tensor.type("torch.DoubleTensor").dtype == torch.float64


@needs_no_gpu
def test_random_state_round_trip(machine):
    torch.cuda.manual_seed(7)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4, device="cuda"), first)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(4), first)  # one generator: the CPU's
    torch.random.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)


@needs_no_gpu
def test_megatron_forks_and_restores_random_states(machine):
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    torch.manual_seed(1)
    tracker.add("model-parallel", 5)
    outside = torch.get_rng_state()
    with tracker.fork("model-parallel"):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), outside)
    with tracker.fork("model-parallel"):
        assert not torch.equal(torch.rand(3), first)
    tracker.reset()
    tracker.add("model-parallel", 5)
    with tracker.fork("model-parallel"):
        assert torch.equal(torch.rand(3), first)


@needs_no_gpu
def test_device_queries_of_megatron(machine):
    assert torch.cuda.is_available() and torch.cuda.device_count() == 1 and torch.cuda.current_device() == 0
    assert torch.cuda.get_device_properties(0).total_memory > 2**30
    assert torch.cuda.max_memory_allocated() > 2**20
    with torch.cuda.stream(torch.cuda.Stream()), torch.cuda.device(0):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
    torch.cuda.synchronize()
    assert event.query() and event.elapsed_time(torch.cuda.Event()) == 0.0


@needs_no_gpu
def test_nccl_becomes_gloo(machine):
    store = torch.distributed.HashStore()
    if torch.distributed.is_initialized():
        pytest.skip("another test of this process has initialized torch.distributed")
    device = torch.device("cuda", 0)
    torch.distributed.init_process_group("nccl", rank=0, world_size=1, store=store, device_id=device)
    try:
        assert torch.distributed.get_backend() == "gloo"
    finally:
        torch.distributed.destroy_process_group()


def test_qad_error_is_a_runtime_error():
    assert issubclass(QADError, RuntimeError)


BACKWARD = """
import json, torch
import megatron_qad.engine as engine
engine.init_runtime()

class OnDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1
    @staticmethod
    def backward(ctx, grad):
        return torch.empty(grad.shape, device=torch.cuda.current_device()).copy_(grad)

grads = []
for run in (lambda y, x: torch.autograd.backward(y), lambda y, x: y.backward(), lambda y, x: torch.autograd.grad(y, x)):
    x = torch.ones(2, requires_grad=True)
    result = run(OnDevice.apply(x).sum(), x)
    grads.append((result[0] if result else x.grad).tolist())
print(json.dumps(grads))
"""


@needs_no_gpu
def test_cuda_means_cpu_in_backward_passes():
    assert run_in_new_process(BACKWARD) == [[1.0, 1.0]] * 3
