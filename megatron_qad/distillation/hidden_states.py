"""Losses between the hidden states of chosen student and teacher layers, on any pipeline stage.

The loss of a layer is not sent to the last stage. ``attach_loss`` attaches it to the layer's output, so that its
gradient is added there during the ordinary backward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


@dataclass(frozen=True, kw_only=True)
class HiddenLoss:
    """Base class of losses between layer outputs, averaged over the chosen layers.

    Args:
        layers: positions in the student's layer pattern, from 0; negative ones count from the end. None means all
            layers.
        teacher_layers: the teacher layer that each of them is compared with. None means the same positions.
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
            raise ValueError(f"teacher_layers={teacher_layers!r}: expected one layer for each of layers={layers!r}")
        for name, given in (("layers", layers), ("teacher_layers", teacher_layers)):
            object.__setattr__(self, name, None if given is None else tuple(given))

    def pairs(self, num_layers: int, num_teacher_layers: int) -> list[tuple[int, int]]:
        """Return pairs (student layer, teacher layer), counted from 0.

        Raises:
            ValueError: a position is out of range, or a student layer is given twice.
        """
        student = list(self.layers if self.layers is not None else range(num_layers))
        teacher = list(self.teacher_layers if self.teacher_layers is not None else student)
        for model, layers, size in (("student", student, num_layers), ("teacher", teacher, num_teacher_layers)):
            if missing := [layer for layer in layers if not -size <= layer < size]:
                raise ValueError(f"layer {missing[0]} is out of range for the {model}, which has {size} layers")
        if len({layer % num_layers for layer in student}) < len(student):
            raise ValueError(f"layers {student} name a layer of the student twice; it has {num_layers} layers")
        return [(a % num_layers, b % num_teacher_layers) for a, b in zip(student, teacher, strict=True)]

    def per_token(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return each token's loss, float32 [...], from hidden states [..., H] of any float dtype.

        The teacher's hidden states receive no gradient.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class HiddenMSE(HiddenLoss):
    """Relative squared error of each token, |h_s - h_t|^2 / |h_t|^2.

    Without the division, the few tokens with massive activations would dominate the loss.
    """

    def per_token(self, student: Tensor, teacher: Tensor) -> Tensor:
        teacher = teacher.detach().float()
        error = (student.float() - teacher).square().sum(dim=-1)
        norm = teacher.square().sum(dim=-1)
        return error / torch.where(norm > 0, norm, 1.0)


@dataclass(frozen=True, kw_only=True)
class HiddenCosine(HiddenLoss):
    """Cosine distance of each token, 1 - cos(h_s, h_t)."""

    def per_token(self, student: Tensor, teacher: Tensor) -> Tensor:
        return 1 - cosine_similarity(student.float(), teacher.detach().float(), dim=-1)


def attach_loss(hidden: Tensor, loss: Tensor) -> Tensor:
    """Return ``hidden`` unchanged. Its backward pass also runs that of the scalar ``loss``, with a gradient of 1."""
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
