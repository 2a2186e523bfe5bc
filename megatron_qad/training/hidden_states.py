"""Hidden-state losses in training: the teacher's layers leave their outputs in the batch, the student's meet them.

Both are forward hooks, active during a training step only. Nothing is sent between stages: a layer's loss hangs on its
own output (``attach_loss``), so the two layers of a pair must be on one pipeline rank. The teacher's outputs of all
microbatches are kept until the student's layer has used them. The losses' sums join the others in the log after the
step.
"""

import argparse
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from contextlib import contextmanager

import torch
from megatron.core import mpu
from megatron.core.utils import get_model_config, unwrap_model
from megatron.training import get_args
from torch import Tensor

from megatron_qad.distillation import Term, WeightedLosses
from megatron_qad.distillation.hidden_states import HiddenLoss, attach_loss
from megatron_qad.engine.errors import QADError
from megatron_qad.training.batch import Batch, running_batch
from megatron_qad.training.layout import num_virtual_stages, ranks_of_layers, teacher_virtual_stages, with_stages


def check_hidden_losses(args: argparse.Namespace, losses: WeightedLosses, shapes: Mapping[str, Mapping]) -> None:
    """Refuse layers that a model does not have or that lie on different pipeline ranks, and models of different widths.

    Args:
        args: parsed. shapes: as ``layout.check_layout`` takes them.
    """
    terms = losses.of_kind(HiddenLoss)
    if not terms:
        return
    student, teacher = shapes["the student"], shapes["the teacher"]
    widths = [shape["hidden-size"] for shape in (student, teacher)]
    if widths[0] != widths[1]:
        raise QADError(
            f"--qad-loss: {terms[0].name} compares hidden states of {widths[0]} and {widths[1]} elements; it needs a "
            "teacher of the student's hidden size"
        )
    patterns = [shape["hybrid-layer-pattern"] for shape in (student, teacher)]
    pp = args.pipeline_model_parallel_size
    virtual = (num_virtual_stages(args), teacher_virtual_stages(len(patterns[1]), args))
    ranks = [ranks_of_layers(with_stages(p, pp * v), pp) for p, v in zip(patterns, virtual, strict=True)]
    for term in terms:
        try:
            pairs = term.loss.pairs(*map(len, patterns))
        except ValueError as error:
            raise QADError(f"--qad-loss: {term.name}: {error}") from error
        for mine, theirs in pairs:
            if ranks[0][mine] != ranks[1][theirs]:
                raise QADError(
                    f"--qad-loss: {term.name} compares layer {mine} of the student, on pipeline rank {ranks[0][mine]}, "
                    f"with layer {theirs} of the teacher, on rank {ranks[1][theirs]}; choose layers on one rank "
                    "(teacher_layers=[...]) or fewer pipeline stages"
                )


class HiddenStates:
    """The hooks of one rank.

    Args:
        terms: the hidden-state losses of ``--qad-loss``.
        student, teacher: model chunks.
        num_layers: of the student's and of the teacher's whole pattern.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        student: Sequence[torch.nn.Module],
        teacher: Sequence[torch.nn.Module],
        num_layers: tuple[int, int],
    ):
        self.terms = terms
        self._config = get_model_config(student[0])
        self._is_active = False
        self._sums = torch.zeros(len(terms), dtype=torch.float64, device=torch.cuda.current_device())
        # By the student's layer: (term's number, teacher's layer, pairs of that term).
        self._pairs: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for number, term in enumerate(terms):
            pairs = term.loss.pairs(*num_layers)
            for mine, theirs in pairs:
                self._pairs[mine].append((number, theirs, len(pairs)))
        self._recomputed: dict[int, deque[Batch]] = defaultdict(deque)
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

    @contextmanager
    def active(self):
        """Inside, the teacher's layers keep their outputs and the student's are compared with them."""
        self._is_active = True
        try:
            yield
        finally:
            self._is_active = False

    def _keep(self, keys: list[tuple[int, int]], output) -> None:
        if self._is_active:
            # Another tensor of the same memory: Megatron's interleaved schedule empties the one that a stage has
            # sent, also in a forward-only pass.
            state = _hidden_of(output).detach()
            running_batch().teacher_states.update(dict.fromkeys(keys, state))

    def _compare(self, index: int, output):
        if not self._is_active:
            return None
        if not torch.is_grad_enabled():  # activation recompute: the pass that counts comes within the backward pass
            self._recomputed[index].append(running_batch())
            return None
        batch = self._recomputed[index].popleft() if self._recomputed[index] else running_batch()
        hidden, total = _hidden_of(output), 0.0
        weight, step = self._token_weights(batch), get_args().curr_iteration + 1
        for number, _, num_pairs in self._pairs[index]:
            term, state = self.terms[number], batch.teacher_states.pop((number, index))
            value = (term.loss.per_token(hidden, state) * weight).sum() / num_pairs
            self._sums[number] += value.detach()
            total = total + term.weight.at(step) * value
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
        step = get_args().curr_iteration + 1
        for term, value in zip(self.terms, sums.float(), strict=True):
            add_to_reports(losses_reduced, term, step, [value] + [torch.zeros_like(value)] * (len(losses_reduced) - 1))
        self._sums.zero_()


def add_to_reports(reports: list[dict[str, Tensor]], term: Term, step: int, values: Sequence[Tensor]) -> None:
    """One more part of the loss in each microbatch's report, (sum, tokens); and in its "total loss"."""
    for report, value in zip(reports, values, strict=False):  # no reports but on the last stage
        report[f"{term.name} loss"] = torch.stack((value, report["total loss"][1]))
        report["total loss"][0] += term.weight.at(step) * value


def _layers(chunks: Sequence[torch.nn.Module]):
    """(place in the whole pattern, layer) of the layers on this rank."""
    for chunk in chunks:
        for layer in unwrap_model(chunk).decoder.layers:
            yield layer.layer_number - 1, layer


def _hidden_of(output) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
