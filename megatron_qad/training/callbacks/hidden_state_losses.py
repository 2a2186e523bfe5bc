"""Hidden-state losses in training: the teacher's layers leave their outputs in the batch, the student's meet them.

Both are forward hooks, active during a training step only. Nothing is sent between stages: a layer's loss hangs on its
own output (``attach_loss``), so the two layers of a pair must be on one pipeline rank. The teacher's outputs of all
microbatches are kept until the student's layer has used them. The losses' sums join the others in the log after the
step.
"""

from collections import defaultdict, deque
from collections.abc import Sequence

import torch
from megatron.core import mpu
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor

from megatron_qad.distillation.hidden_states import HiddenLoss, attach_loss
from megatron_qad.engine.events import Callback
from megatron_qad.training.batch import Batch
from megatron_qad.training.loss import add_to_reports


class HiddenStateLosses(Callback):
    """The hidden-state losses of ``--qad-loss`` on one rank."""

    def __init__(self, job):
        self._job = job
        self.terms = job.config.losses.terms_of_type(HiddenLoss)
        self._is_active = False
        # By the student's layer: (term's number, teacher's layer, pairs of that term).
        self._pairs: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        self._recomputed: dict[int, deque[Batch]] = defaultdict(deque)

    def student_ready(self, student: Sequence[torch.nn.Module]) -> None:
        config, teacher = self._job.config, self._job.teacher.chunks
        self._config = get_model_config(student[0])
        self._sums = torch.zeros(len(self.terms), dtype=torch.float64, device=torch.cuda.current_device())
        for number, term in enumerate(self.terms):
            pairs = term.loss.pairs(config.student.num_layers, config.teacher.num_layers)
            for mine, theirs in pairs:
                self._pairs[mine].append((number, theirs, len(pairs)))
        wanted_by = defaultdict(list)
        for index, layer in _layers(student):
            if index in self._pairs:
                layer.register_forward_hook(lambda _layer, _args, output, i=index: self._compare(i, output))
                for number, theirs, _ in self._pairs[index]:
                    wanted_by[theirs].append((number, index))
        for index, layer in _layers(teacher):
            if index in wanted_by:
                keys = wanted_by[index]
                layer.register_forward_hook(lambda _layer, _args, output, keys=keys: self._keep(keys, output))

    def forward_begins(self, batches, is_training: bool) -> None:
        """In a training step the teacher's layers keep their outputs, and the student's are compared with them."""
        self._is_active = is_training

    def forward_ended(self, reports: list[dict[str, Tensor]], is_training: bool) -> None:
        self._is_active = False
        if is_training:
            self.report(reports)

    def _keep(self, keys: list[tuple[int, int]], output) -> None:
        if self._is_active:
            # Another tensor of the same memory: Megatron's interleaved schedule empties the one that a stage has
            # sent, also in a forward-only pass.
            state = _hidden_of(output).detach()
            self._job.forward.batch.teacher_states.update(dict.fromkeys(keys, state))

    def _compare(self, index: int, output):
        if not self._is_active:
            return None
        if not torch.is_grad_enabled():  # activation recompute: the pass that counts comes within the backward pass
            self._recomputed[index].append(self._job.forward.batch)
            return None
        batch = self._recomputed[index].popleft() if self._recomputed[index] else self._job.forward.batch
        hidden, total = _hidden_of(output), 0.0
        weight, step = self._token_weights(batch), self._job.loop.step
        for number, _, num_pairs in self._pairs[index]:
            term, state = self.terms[number], batch.teacher_states.pop((number, index))
            value = (term.loss.per_token(hidden, state) * weight).sum() / num_pairs
            self._sums[number] += value.detach()
            total = total + term.weight.at_step(step) * value
        if self._config.grad_scale_func is not None:
            total = self._config.grad_scale_func(total)
        hidden = attach_loss(hidden, total)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _token_weights(self, batch: Batch) -> Tensor:
        """The loss mask as hidden states lie on this rank: [s, b], under sequence parallelism [s/tp, b]."""
        weight = batch.loss_mask.t()
        if self._config.sequence_parallel:
            weight = weight.chunk(mpu.get_tensor_model_parallel_world_size())[mpu.get_tensor_model_parallel_rank()]
        return weight

    def report(self, losses_reduced: list[dict[str, Tensor]]) -> None:
        """Add this step's sums to the reports of its microbatches, which the last stage has. Collective."""
        counts_once = self._config.sequence_parallel or mpu.get_tensor_model_parallel_rank() == 0
        sums = self._sums if counts_once else torch.zeros_like(self._sums)
        torch.distributed.all_reduce(sums, group=mpu.get_model_parallel_group())
        step = self._job.loop.step
        for term, value in zip(self.terms, sums.float(), strict=True):
            add_to_reports(losses_reduced, term, step, [value] + [torch.zeros_like(value)] * (len(losses_reduced) - 1))
        self._sums.zero_()


def _layers(chunks: Sequence[torch.nn.Module]):
    """(place in the whole pattern, layer) of the layers on this rank."""
    for chunk in chunks:
        for layer in unwrap_model(chunk).decoder.layers:
            yield layer.layer_number - 1, layer


def _hidden_of(output) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
