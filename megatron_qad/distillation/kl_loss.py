"""The KL loss of plain PyTorch code: complete logits in, a mean over the counted tokens out."""

from torch import Tensor

from megatron_qad.distillation.divergences import KL
from megatron_qad.distillation.tiles import VocabShard
from megatron_qad.distillation.vocab_parallel import logit_losses


def kl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    num_tokens: Tensor | int | None = None,
    in_place: bool = True,
) -> Tensor:
    """Return KL(teacher || student) of the next-token distributions, a mean over the counted tokens, float32 [] in
    nats.

    Both distributions are softmax(logits / temperature) in float32, computed in tiles without a float32 copy of the
    logits. Source: arXiv:2601.20088, equation 1.

    Args:
        student_logits: [..., V] in float32, bfloat16 or float16. The backward pass writes their gradient over them.
        teacher_logits: the same shape, any float dtype; they get no gradient.
        mask: [...], bool or numbers; tokens with 0 do not count. None: all tokens count.
        temperature: softmax temperature of both models. The loss is not rescaled by its square.
        num_tokens: divisor. None: the number of tokens that count here. With several microbatches or processes, pass
            the number of tokens that count in all of them, and add the losses, so that all tokens weigh the same.
        in_place: False keeps the student's logits.

    Raises:
        ValueError: the shapes of the logits differ, or the temperature is not a finite number above 0.

    Example::

        student, teacher = torch.randn(2, 4, 8, requires_grad=True), torch.randn(2, 4, 8)
        kl_loss(student, teacher, torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])).backward()  # a mean of five tokens
    """
    shard = VocabShard(0, student_logits.shape[-1])
    losses = [KL(temperature=temperature)]
    weight = None if mask is None else mask != 0
    (values,) = logit_losses(losses, student_logits, teacher_logits, None, shard, weight=weight, in_place=in_place)
    if num_tokens is None:
        num_tokens = values.numel() if weight is None else weight.sum().clamp(min=1)
    return values.sum() / num_tokens
