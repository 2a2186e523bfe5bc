"""Worker: the local spec's core attention beside Megatron's on four ranks, context-parallel groups of 1, 2 and 4.

A result a case: largest relative errors of output and gradients over the ranks, and the largest tensor kept for the
backward pass as a multiple of the query's size.
"""

from types import SimpleNamespace

HEADS, DIM = 4, 16
CASES = [
    # groups of the keys, rows, softmax scale, document lengths (None: not packed, the row's length)
    {"groups": 4, "rows": 2, "scale": None, "documents": None, "length": 128},
    {"groups": 2, "rows": 3, "scale": None, "documents": None, "length": 64},
    {"groups": 1, "rows": 1, "scale": 0.37, "documents": None, "length": 64},
    {"groups": 2, "rows": 1, "scale": None, "documents": [64], "length": 64},
    {"groups": 2, "rows": 1, "scale": 0.37, "documents": [8, 40, 16, 8, 56], "length": 128},
]


def cases(arguments: dict) -> list:
    from megatron_qad.engine import init_runtime

    init_runtime()
    import torch
    from megatron.core import mpu
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo")
    mpu.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    results = []
    for size in (1, 2, 4):
        groups = [torch.distributed.new_group(list(range(i, i + size))) for i in range(0, 4, size)]
        group = groups[torch.distributed.get_rank() // size]
        for case in CASES:
            errors = torch.tensor(_compare(group, size, case), dtype=torch.float64)
            torch.distributed.all_reduce(errors, op=torch.distributed.ReduceOp.MAX)
            results.append(case | {"size": size, "error": errors[:4].max().item(), "kept": errors[4].item()})
    return results


def _compare(group, size: int, case: dict) -> list[float]:
    import torch
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from megatron_qad.models.attention import CoreAttention
    from megatron_qad.models.context_parallel import Documents, take_chunks

    lengths = case["documents"] or [case["length"]]
    generator = torch.Generator().manual_seed(case["length"] + case["groups"])

    def random(heads):
        return torch.randn(case["length"], case["rows"], heads, DIM, generator=generator, dtype=torch.float64)

    whole = [random(HEADS), random(case["groups"]), random(case["groups"])]
    weight = random(HEADS).flatten(2)
    # Megatron's, document by document, on the whole row.
    for tensor in whole:
        tensor.requires_grad_()
    upstream = _build(DotProductAttention, case, size=1, group=None)
    parts = zip(*(tensor.split(lengths) for tensor in whole), strict=True)
    expected = torch.cat([upstream(*part, None) for part in parts])
    torch.autograd.backward((expected * weight).sum())
    # Ours, on this rank's chunks.
    rank = group.rank()

    def mine(tensor):  # the rank's tokens; [s, b, ...] to [b, s, ...] and back
        return take_chunks(tensor.detach().transpose(0, 1), lengths, rank, size).transpose(0, 1).contiguous()

    local = [mine(tensor).requires_grad_() for tensor in whole]
    ours = _build(CoreAttention, case, size=size, group=group)
    packed = Documents.from_lengths(lengths) if case["documents"] else None
    inputs = [tensor.squeeze(1) for tensor in local] if packed else local
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        found = ours(*inputs, None, packed_seq_params=packed)
    loss = (found.reshape(mine(weight).shape) * mine(weight)).sum()
    torch.autograd.backward(loss)
    pairs = [(found.reshape(mine(weight).shape), mine(expected))]
    pairs += [(a.grad, mine(b.grad)) for a, b in zip(local, whole, strict=True)]
    errors = [((a - b).norm() / b.norm()).item() for a, b in pairs]
    return [*errors, max(kept) / whole[0].numel()]


def _build(kind, case: dict, *, size: int, group):
    import torch
    from megatron.core import mpu
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        num_query_groups=case["groups"],
        kv_channels=DIM,
        attention_dropout=0.0,
        params_dtype=torch.float64,
        attention_softmax_in_fp32=False,
        context_parallel_size=size,
    )
    groups = SimpleNamespace(tp=mpu.get_tensor_model_parallel_group(), cp=group)
    return kind(config, 1, AttnMaskType.causal, "self", softmax_scale=case["scale"], pg_collection=groups)
