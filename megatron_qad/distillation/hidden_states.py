"""Losses between hidden states of chosen layers of both models, on whatever pipeline stage those are.

A layer's loss does not travel to the last stage: ``attach_loss`` hangs it on the layer's own output, so that its
gradient joins there in the ordinary backward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


@dataclass(frozen=True, kw_only=True)
class HiddenLoss:
    """A loss of layer outputs, averaged over the chosen layers.

    Args:
        layers: positions in the student's layer pattern, from 0, negative from its end; default: every layer.
        teacher_layers: the teacher's layer beside each of them; default: the same positions.
    """

    layers: Sequence[int] | None = None
    teacher_layers: Sequence[int] | None = None

    needs_teacher = True

    def __post_init__(self):
        layers, teacher_layers = self.layers, self.teacher_layers
        for name, given in (("layers", layers), ("teacher_layers", teacher_layers)):
            if given is not None and not (isinstance(given, (list, tuple)) and given and all(map(_is_int, given))):
                raise ValueError(f"{name}={given!r}: expected a list of layer positions such as [0, -1]")
        if teacher_layers is not None and len(teacher_layers) != len(layers or ()):
            raise ValueError(f"teacher_layers={teacher_layers!r}: expected one for each of layers={layers!r}")
        for name, given in (("layers", layers), ("teacher_layers", teacher_layers)):
            object.__setattr__(self, name, None if given is None else tuple(given))

    def pairs(self, num_layers: int, num_teacher_layers: int) -> list[tuple[int, int]]:
        """(student's layer, teacher's layer), counted from 0.

        Raises:
            ValueError: a layer that one of the models does not have, or one of the student's twice.
        """
        mine = list(self.layers if self.layers is not None else range(num_layers))
        theirs = list(self.teacher_layers if self.teacher_layers is not None else mine)
        for layers, number, who in ((mine, num_layers, "student"), (theirs, num_teacher_layers, "teacher")):
            if missing := [layer for layer in layers if not -number <= layer < number]:
                raise ValueError(f"the {who} has {number} layers, none at position {missing[0]}")
        if len({layer % num_layers for layer in mine}) < len(mine):
            raise ValueError(f"layers {mine} of the student's {num_layers} name one of them twice")
        return [(a % num_layers, b % num_teacher_layers) for a, b in zip(mine, theirs, strict=True)]

    def per_token(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[..., H] of both models, any float dtype -> float32 [...]. The teacher's gets no gradient."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class HiddenMSE(HiddenLoss):
    """|h_s - h_t|^2 / |h_t|^2 of each token: the squared error as a share of what should be there. Without the
    division the few tokens with massive activations would be all of it."""

    def per_token(self, student: Tensor, teacher: Tensor) -> Tensor:
        teacher = teacher.detach().float()
        error = (student.float() - teacher).square().sum(dim=-1)
        size = teacher.square().sum(dim=-1)
        return error / torch.where(size > 0, size, 1.0)


@dataclass(frozen=True, kw_only=True)
class HiddenCosine(HiddenLoss):
    """1 - cosine of the angle between h_s and h_t of each token."""

    def per_token(self, student: Tensor, teacher: Tensor) -> Tensor:
        return 1 - cosine_similarity(student.float(), teacher.detach().float(), dim=-1)


def attach_loss(hidden: Tensor, loss: Tensor) -> Tensor:
    """``hidden`` unchanged, whose backward pass also runs that of the scalar ``loss``, with a gradient of 1."""
    return _AttachLoss.apply(hidden, loss)


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, loss):
        ctx.ones = torch.ones_like(loss)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad):
        return grad, ctx.ones


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
