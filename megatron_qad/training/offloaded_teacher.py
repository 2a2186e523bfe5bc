"""A teacher whose layers are in host memory and are copied to the device one after the other, once per step.

All microbatches of a step pass through a layer before the next one runs, while the weights of the next layer are being
copied. The device holds two layers, and the hidden states of all microbatches at one layer. Embedding, final norm and
output layer stay on the device. A stage sends its outputs only after its last layer, so that the stages wait for each
other: pipeline parallelism saves memory here, but no time.

Megatron's own model code runs the layers: its transformer stack is called with one layer at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_tensor_shapes
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor

from megatron_qad.training.batch import Batch, ForwardPass
from megatron_qad.training.teacher import Teacher


class HostWeights:
    """Keeps the weights of layers in pinned host memory, and copies them to the device in turn."""

    def __init__(self, layers: Sequence[torch.nn.Module]):
        self._parameters = [list(layer.parameters()) for layer in layers]
        self._host = [[_to_host(parameter) for parameter in layer] for layer in self._parameters]
        self._stream = torch.cuda.Stream()
        self._in_flight: dict[int, tuple[list[Tensor], torch.cuda.Event]] = {}
        self.num_fetched = 0
        """Number of copies of a layer to the device so far."""
        for i in range(len(layers)):
            self._release(i)
        torch.cuda.empty_cache()  # the freed memory belongs to another stream than that of the copies

    def iterate(self) -> Iterator[int]:
        """Yield the index of each layer in turn; its weights are on the device until the next index is requested."""
        num_layers = len(self._parameters)
        done = None
        if num_layers:
            self._fetch(0)
        for i in range(num_layers):
            self._receive(i)
            yield i
            if done is not None:
                done.synchronize()  # the previous layer is computed and freed: at most two layers are on the device
            if i + 1 < num_layers:
                self._fetch(i + 1)
            self._release(i)
            done = torch.cuda.Event()
            done.record()

    def _fetch(self, i: int) -> None:
        device = torch.cuda.current_device()
        with torch.cuda.stream(self._stream):
            copies = [
                torch.empty(h.shape, dtype=h.dtype, device=device).copy_(h, non_blocking=True) for h in self._host[i]
            ]
            copied = torch.cuda.Event()
            copied.record(self._stream)
        self._in_flight[i] = copies, copied
        self.num_fetched += 1

    def _receive(self, i: int) -> None:
        copies, copied = self._in_flight.pop(i)
        compute = torch.cuda.current_stream()
        compute.wait_event(copied)
        for parameter, copy in zip(self._parameters[i], copies, strict=True):
            if copy.is_cuda:  # allocated on the copy stream, which must not reuse it before the compute stream is done
                copy.record_stream(compute)
            parameter.data = copy

    def _release(self, i: int) -> None:
        for parameter in self._parameters[i]:
            parameter.data = parameter.data.new_empty(0)


class OffloadedTeacher(Teacher):
    """A ``Teacher`` with one chunk whose layers are in host memory. Its outputs are equal bit for bit."""

    def __init__(
        self, chunks: Sequence[torch.nn.Module], forward: ForwardPass, joined: int = 1, keeps_hidden: bool = False
    ):
        super().__init__(chunks, forward, joined, keeps_hidden)
        (self._chunk,) = self.chunks
        self._stack = unwrap_model(self._chunk).decoder
        self.host = HostWeights(self._stack.layers)

    def forward(self, batches: Sequence[Batch], **shape) -> list[Tensor]:
        pipe = P2PCommunicator(mpu.get_pipeline_model_parallel_group(), get_model_config(self._chunk))
        shapes = _shapes(self._chunk, **shape)
        calls = []
        for batch in batches:
            self._chunk.set_input_tensor(pipe.recv_forward(shapes, pipe.is_pp_first_stage))
            calls.append(self._stack_call(batch))
        layers = list(self._stack.layers)
        for i in self.host.iterate():
            with _restricted_to([layers[i]], self._stack, runs_final_norm=False):
                for batch, call in zip(batches, calls, strict=True):
                    with self._forward.running(batch):
                        call["hidden_states"] = self._stack(**call)
        if not pipe.is_pp_last_stage:
            for call in calls:
                pipe.send_forward(call["hidden_states"], False)
            return []
        outputs = []
        with _restricted_to([], self._stack, runs_final_norm=True):
            for batch in batches:
                outputs.append(self._finish(batch, calls.pop(0)["hidden_states"]))
        return outputs

    def _stack_call(self, batch: Batch) -> dict:
        """Run the model up to the call of its transformer stack, and return the arguments of that call."""

        def stop(_stack, args, kwargs):
            raise _StackCalled(kwargs)

        handle = self._stack.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._forward(self._chunk, batch)
        except _StackCalled as called:
            received = {} if self._stack.pre_process else {"hidden_states": self._stack.input_tensor}
            return called.kwargs | received
        finally:
            handle.remove()
        raise AssertionError("the model did not call its stack")

    def _finish(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Return the output for the last layer's hidden states: run the model with an empty stack that takes them."""

        def begin(_stack, args, kwargs):
            return args, kwargs | {"hidden_states": hidden}

        handle = self._stack.register_forward_pre_hook(begin, with_kwargs=True)
        try:
            return self._forward(self._chunk, batch, hidden=self.keeps_hidden)
        finally:
            handle.remove()


class _StackCalled(Exception):
    def __init__(self, kwargs: dict):
        super().__init__()
        self.kwargs = kwargs


@contextmanager
def _restricted_to(layers: list[torch.nn.Module], stack: torch.nn.Module, *, runs_final_norm: bool) -> Iterator[None]:
    """Context manager: inside, the stack runs only ``layers``, on an input argument, with or without the final norm."""
    original = stack.layers, stack.pre_process, stack.post_process
    stack.layers, stack.pre_process = torch.nn.ModuleList(layers), True
    stack.post_process = original[2] and runs_final_norm
    try:
        yield
    finally:
        stack.layers, stack.pre_process, stack.post_process = original


def _to_host(parameter: torch.nn.Parameter) -> Tensor:
    return torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu", pin_memory=True).copy_(parameter.data)


def _shapes(chunk: torch.nn.Module, *, seq_length: int, micro_batch_size: int, decoder_seq_length: int | None = None):
    return get_tensor_shapes(
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        decoder_seq_length=decoder_seq_length,
        config=get_model_config(chunk),
        tp_group=mpu.get_tensor_model_parallel_group(),
        cp_group=mpu.get_context_parallel_group(),
    )
