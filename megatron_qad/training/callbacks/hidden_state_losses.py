"""Hidden-state losses: compares outputs of the student's layers with those of the teacher's layers in training.

Forward hooks on the teacher's layers store their outputs in the batch; hooks on the student's layers compute the loss.
They are active in training steps only. The loss is attached to the output of its layer (``attach_loss``) and nothing is
sent between stages, so both layers of a pair must be on the same pipeline rank. The teacher's outputs of all
microbatches are stored until the student's layer has used them. The sums are added to the log after the step.
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
        # Layer of the student -> (index of the term, layer of the teacher, number of pairs of that term).
        self._pairs: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        self._recomputed: dict[int, deque[Batch]] = defaultdict(deque)

    def student_ready(self, student: Sequence[torch.nn.Module]) -> None:
        config, teacher = self._job.config, self._job.teacher.chunks
        self._config = get_model_config(student[0])
        self._sums = torch.zeros(len(self.terms), dtype=torch.float64, device=torch.cuda.current_device())
        for term_index, term in enumerate(self.terms):
            pairs = term.loss.pairs(config.student.num_layers, config.teacher.num_layers)
            for student_layer, teacher_layer in pairs:
                self._pairs[student_layer].append((term_index, teacher_layer, len(pairs)))
        keys_by_layer = defaultdict(list)  # layer of the teacher -> keys of ``Batch.teacher_states``
        for index, layer in _layers(student):
            if index in self._pairs:
                layer.register_forward_hook(lambda _layer, _args, output, i=index: self._compare(i, output))
                for term_index, teacher_layer, _ in self._pairs[index]:
                    keys_by_layer[teacher_layer].append((term_index, index))
        for index, layer in _layers(teacher):
            if index in keys_by_layer:
                keys = keys_by_layer[index]
                layer.register_forward_hook(lambda _layer, _args, output, keys=keys: self._keep(keys, output))

    def forward_begins(self, batches, is_training: bool) -> None:
        """Activate the hooks for a training step."""
        self._is_active = is_training

    def forward_ended(self, reports: list[dict[str, Tensor]], is_training: bool) -> None:
        self._is_active = False
        if is_training:
            self.report(reports)

    def _keep(self, keys: list[tuple[int, int]], output) -> None:
        if self._is_active:
            # detach() makes another tensor with the same memory: Megatron's interleaved schedule empties tensors that
            # a stage has sent, also in a forward-only pass.
            state = _hidden_states(output).detach()
            self._job.forward.batch.teacher_states.update(dict.fromkeys(keys, state))

    def _compare(self, index: int, output):
        if not self._is_active:
            return None
        if not torch.is_grad_enabled():  # activation recompute: the loss is computed when the backward pass recomputes
            self._recomputed[index].append(self._job.forward.batch)
            return None
        batch = self._recomputed[index].popleft() if self._recomputed[index] else self._job.forward.batch
        hidden, total = _hidden_states(output), 0.0
        weight, step = self._token_weights(batch), self._job.loop.step
        for term_index, _, num_pairs in self._pairs[index]:
            term, state = self.terms[term_index], batch.teacher_states.pop((term_index, index))
            value = (term.loss.per_token(hidden, state) * weight).sum() / num_pairs
            self._sums[term_index] += value.detach()
            total = total + term.weight.at_step(step) * value
        if self._config.grad_scale_func is not None:
            total = self._config.grad_scale_func(total)
        hidden = attach_loss(hidden, total)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _token_weights(self, batch: Batch) -> Tensor:
        """Return the loss mask in the shape of the hidden states: [s, b], or [s/tp, b] with sequence parallelism."""
        weight = batch.loss_mask.t()
        if self._config.sequence_parallel:
            weight = weight.chunk(mpu.get_tensor_model_parallel_world_size())[mpu.get_tensor_model_parallel_rank()]
        return weight

    def report(self, losses_reduced: list[dict[str, Tensor]]) -> None:
        """Add the sums of this step to the reports of its microbatches on the last stage. Collective."""
        counts_once = self._config.sequence_parallel or mpu.get_tensor_model_parallel_rank() == 0
        sums = self._sums if counts_once else torch.zeros_like(self._sums)
        torch.distributed.all_reduce(sums, group=mpu.get_model_parallel_group())
        step = self._job.loop.step
        for term, value in zip(self.terms, sums.float(), strict=True):
            add_to_reports(losses_reduced, term, step, [value] + [torch.zeros_like(value)] * (len(losses_reduced) - 1))
        self._sums.zero_()


def _layers(chunks: Sequence[torch.nn.Module]):
    """Yield (index in the layer pattern, layer) for the layers on this rank."""
    for chunk in chunks:
        for layer in unwrap_model(chunk).decoder.layers:
            yield layer.layer_number - 1, layer


def _hidden_states(output) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
