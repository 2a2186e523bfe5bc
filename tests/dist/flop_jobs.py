"""Counts the operations of forward and backward passes with torch's counter, for test_flop_counts.py."""

import json
from pathlib import Path


def count(checkpoints: list[str], rows: int, length: int, result: str) -> None:
    """Count each model on ``rows`` sequences; write [forward, forward and backward] of each to ``result``."""
    import worker_job

    counts = []
    for checkpoint in checkpoints:
        with worker_job.job(checkpoint, 1, 1, "--seq-length", str(length)) as job:
            counts.append(_count(job, rows, length))
    Path(result).write_text(json.dumps(counts))


def _count(job, rows: int, length: int) -> list[int]:
    import torch

    from megatron_qad.models.builder import build_chunks
    from megatron_qad.training.batch import Batch
    from megatron_qad.training.models import model_config

    (chunk,) = build_chunks(model_config(job.config, job.args, job.config.student))
    tokens = torch.arange(rows * length).view(rows, length) % job.config.student.vocab_size
    batch = Batch(tokens, position_ids=torch.arange(length).expand(rows, length))
    forward, both = _counter(), _counter()
    with torch.no_grad(), forward:
        job.forward(chunk, batch)
    with both:
        job.forward(chunk, batch).sum().backward()
    return [forward.get_total_flops(), both.get_total_flops()]


def _counter():
    """Return a counter that knows the operations of the CPU, too: attention and the grouped product of experts."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def attention(query, key, value, *args, **kwargs) -> int:
        """Two products with all keys: the counter's convention, which ignores that half of the scores are masked."""
        b, heads, s, dim = query
        return 4 * b * heads * s * key[2] * dim

    def attention_backward(grad, query, key, value, *args, **kwargs) -> int:
        """Four products of the same size, and the scores that it computes again."""
        return 5 * attention(query, key, value) // 2

    def grouped(a, b, *args, **kwargs) -> int:
        """Rows [tokens, in] by [experts, in, out]; for the matrices' gradient, [in, tokens] by [tokens, out]."""
        return 2 * a[0] * a[1] * b[-1]

    aten = torch.ops.aten
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
        aten._grouped_mm: grouped,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)
