"""Worker: compares the local spec's core attention with Megatron's, on context-parallel groups of 1, 2 and 4 ranks.

The result of a case has the largest relative error of output and gradients over the ranks, and the size of the largest
tensor saved for the backward pass, divided by the query's size.
"""

from types import SimpleNamespace

HEADS, DIM = 4, 16
CASES = [
    # query groups, rows, softmax scale, document lengths (None: not packed), length of a row
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

    inputs = [random(HEADS), random(case["groups"]), random(case["groups"])]
    weight = random(HEADS).flatten(2)
    # Megatron's attention on the full row, document by document.
    for tensor in inputs:
        tensor.requires_grad_()
    upstream = _build(DotProductAttention, case, size=1, group=None)
    parts = zip(*(tensor.split(lengths) for tensor in inputs), strict=True)
    expected = torch.cat([upstream(*part, None) for part in parts])
    torch.autograd.backward((expected * weight).sum())
    # Our attention on this rank's chunks.
    rank = group.rank()

    def local_chunks(tensor):  # [s, b, ...] -> this rank's tokens; take_chunks needs [b, s, ...]
        return take_chunks(tensor.detach().transpose(0, 1), lengths, rank, size).transpose(0, 1).contiguous()

    local = [local_chunks(tensor).requires_grad_() for tensor in inputs]
    ours = _build(CoreAttention, case, size=size, group=group)
    packed = Documents.from_lengths(lengths) if case["documents"] else None
    local_inputs = [tensor.squeeze(1) for tensor in local] if packed else local
    saved_sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved_sizes.append(t.numel()) or t, lambda t: t):
        actual = ours(*local_inputs, None, packed_seq_params=packed)
    loss = (actual.reshape(local_chunks(weight).shape) * local_chunks(weight)).sum()
    torch.autograd.backward(loss)
    pairs = [(actual.reshape(local_chunks(weight).shape), local_chunks(expected))]
    pairs += [(a.grad, local_chunks(b.grad)) for a, b in zip(local, inputs, strict=True)]
    errors = [((a - b).norm() / b.norm()).item() for a, b in pairs]
    return [*errors, max(saved_sizes) / inputs[0].numel()]


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
