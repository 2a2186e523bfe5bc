"""A teacher whose layers live in host memory and visit the device one after the other, once a step.

A step's microbatches go through a layer together: the layer's weights are copied to the device, the next layer's are on
their way meanwhile, and all microbatches pass before they make room. The device holds two layers, and the hidden states
of all microbatches of one layer. Embedding, final norm and output layer stay on the device. Stages wait for each other:
a stage has all its microbatches at its last layer only, so that pipeline parallelism saves memory here, not time.

Megatron's own model code runs every layer: the stack is asked to run one of them at a time.
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
    """The weights of some layers in (pinned) host memory, and their visits to the device."""

    def __init__(self, layers: Sequence[torch.nn.Module]):
        self._parameters = [list(layer.parameters()) for layer in layers]
        self._host = [[_to_host(parameter) for parameter in layer] for layer in self._parameters]
        self._stream = torch.cuda.Stream()
        self._coming: dict[int, tuple[list[Tensor], torch.cuda.Event]] = {}
        self.num_fetched = 0
        """Copies of a layer to the device so far."""
        for i in range(len(layers)):
            self._release(i)
        torch.cuda.empty_cache()  # what they lay in is of another stream than the copies will be

    def visits(self) -> Iterator[int]:
        """Each layer's index in turn, with its weights on the device until the next one is asked for."""
        number = len(self._parameters)
        done = None
        if number:
            self._fetch(0)
        for i in range(number):
            self._arrive(i)
            yield i
            if done is not None:
                done.synchronize()  # the layer before has left the device; this one is computed, the next one copied
            if i + 1 < number:
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
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        self._coming[i] = copies, arrived
        self.num_fetched += 1

    def _arrive(self, i: int) -> None:
        copies, arrived = self._coming.pop(i)
        compute = torch.cuda.current_stream()
        compute.wait_event(arrived)
        for parameter, copy in zip(self._parameters[i], copies, strict=True):
            if copy.is_cuda:  # its memory is the copying stream's: not to be reused before this one is done
                copy.record_stream(compute)
            parameter.data = copy

    def _release(self, i: int) -> None:
        for parameter in self._parameters[i]:
            parameter.data = parameter.data.new_empty(0)


class OffloadedTeacher(Teacher):
    """A ``Teacher`` of one chunk with its layers in host memory. Same outputs, bit for bit."""

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
        for i in self.host.visits():
            with _only([layers[i]], self._stack, finishes=False):
                for batch, call in zip(batches, calls, strict=True):
                    with self._forward.running(batch):
                        call["hidden_states"] = self._stack(**call)
        if not pipe.is_pp_last_stage:
            for call in calls:
                pipe.send_forward(call["hidden_states"], False)
            return []
        outputs = []
        with _only([], self._stack, finishes=True):
            for batch in batches:
                outputs.append(self._finish(batch, calls.pop(0)["hidden_states"]))
        return outputs

    def _stack_call(self, batch: Batch) -> dict:
        """What the model calls its stack with: it runs up to there."""

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
        """The output of the last layer's hidden states: the model runs, with an empty stack that begins with them."""

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
def _only(layers: list[torch.nn.Module], stack: torch.nn.Module, *, finishes: bool) -> Iterator[None]:
    """The stack consists of these layers, takes its input as an argument, and ends with the final norm or not."""
    before = stack.layers, stack.pre_process, stack.post_process
    stack.layers, stack.pre_process = torch.nn.ModuleList(layers), True
    stack.post_process = before[2] and finishes
    try:
        yield
    finally:
        stack.layers, stack.pre_process, stack.post_process = before


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
