"""Jobs of test_experts: the grouped experts compared with Megatron's separate MLPs, on one rank of any parallelism."""

import torch


def compare_with_loop(checkpoint: str, tp: int, flags: list[str], loads: dict[str, list[int]], result: str) -> None:
    """Save the largest relative error over all layers, by load and tensor: output, gradients, and weights when stored.

    Args:
        loads: tokens of each of the model's experts by name of the load.
    """
    from worker_job import job

    from megatron_qad.models.builder import build_chunks
    from megatron_qad.models.experts import Experts
    from megatron_qad.models.weight_loading import load_weights
    from megatron_qad.training.models import model_config

    sizes = ["--seq-length", "8", "--micro-batch-size", "1", "--global-batch-size", "8"]
    with job(checkpoint, tp, 1, *sizes, *flags) as started:
        chunks = build_chunks(model_config(started.config, started.args, started.config.teacher))
        load_weights(chunks, checkpoint)
        grouped = [module for chunk in chunks for module in chunk.modules() if isinstance(module, Experts)]
        assert len(grouped) == 2
        errors: dict[str, float] = {}
        for experts in grouped:
            loop = separate_mlps(experts)
            for load, tokens in loads.items():
                local = tokens[experts.linear_fc1.first_expert :][: experts.num_local_experts]
                actual, expected = run(experts, local), run(loop, local)
                for name in expected:
                    key = f"{load}: {name}"
                    errors[key] = max(errors.get(key, 0.0), relative_error(actual[name], expected[name]))
            assert stored(experts).keys() == stored(loop).keys()
            assert all(same_shard(tensor, stored(loop)[key]) for key, tensor in stored(experts).items())
    gathered: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, errors)
    if torch.distributed.get_rank() == 0:
        torch.save({key: max(rank[key] for rank in gathered) for key in errors}, result)


def separate_mlps(experts):
    """Return Megatron's ``SequentialMLP`` with the weights of ``experts``."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP

    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    loop = SequentialMLP(experts.num_local_experts, experts.config, linears, groups)
    for i, expert in enumerate(loop.local_experts):
        for name in ("linear_fc1", "linear_fc2"):
            getattr(expert, name).weight.data.copy_(getattr(experts, name).weight[i])
            weight, grouped = getattr(expert, name).weight, getattr(experts, name).weight
            assert weight.allreduce == grouped.allreduce
            assert (weight.partition_dim, weight.partition_stride) == (
                grouped.partition_dim - 1,
                grouped.partition_stride,
            )
    return loop


def run(experts, tokens_per_expert: list[int]) -> dict[str, torch.Tensor]:
    """Return the output and the gradients for random tokens: of inputs, routing probabilities and both weights."""
    from megatron_qad.models.experts import Experts

    generator = torch.Generator().manual_seed(sum(tokens_per_expert))
    is_grouped = isinstance(experts, Experts)
    inputs = experts.linear_fc1.weight.shape[-1] if is_grouped else experts.local_experts[0].linear_fc1.weight.shape[-1]
    x = torch.randn(sum(tokens_per_expert), inputs, generator=generator).requires_grad_()
    probs = torch.rand(len(x), generator=generator).requires_grad_()
    experts.zero_grad()
    output, bias = experts(x, torch.tensor(tokens_per_expert), probs)
    assert bias is None
    output.backward(torch.randn(output.shape, generator=generator))
    results = {"output": output.detach(), "input gradient": x.grad, "probability gradient": probs.grad}
    for name in ("linear_fc1", "linear_fc2"):
        if is_grouped:
            results[f"{name} gradient"] = getattr(experts, name).weight.grad
        else:
            results[f"{name} gradient"] = torch.stack([getattr(e, name).weight.grad for e in experts.local_experts])
    return results


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def stored(experts) -> dict:
    """Return the stored tensors of the layer by key and offset, as ``Experts`` has them in checkpoints."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    sharded = experts.sharded_state_dict("layer.experts.", metadata={"singleton_local_shards": True, **_groups()})
    apply_factories(sharded)
    tensors = (value for value in nested_values(sharded) if isinstance(value, ShardedTensor))
    return {f"{tensor.key} at {tensor.global_offset}": tensor for tensor in tensors}


def _groups() -> dict:
    from megatron.core import mpu

    return {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}


def same_shard(a, b) -> bool:
    parts = ("global_shape", "global_offset", "axis_fragmentations", "replica_id", "dtype")
    return torch.equal(a.data, b.data) and all(getattr(a, part) == getattr(b, part) for part in parts)


def merged_amaxes(checkpoint: str, flags: list[str], result: str) -> None:
    """Save what is loaded from checkpoints in which each expert has an amax of its own, 1 to 8, by state name."""
    from worker_job import job

    from megatron_qad.models.builder import build_chunks
    from megatron_qad.quantization.activations import ActivationQuantizers
    from megatron_qad.training.models import model_config

    sizes = ["--seq-length", "8", "--micro-batch-size", "1", "--global-batch-size", "8"]
    with job(checkpoint, 1, 1, *sizes, *flags) as started:
        chunks = build_chunks(model_config(started.config, started.args, started.config.teacher))
        ActivationQuantizers(chunks, started.config.formats).expect_amax()
        state = chunks[0].sharded_state_dict()
        factories = {name: x for name, x in state.items() if "experts.linear" in name and name.endswith("._amax")}
        merged = {}
        for name, factory in factories.items():
            parts = factory.build()
            indices = [int(part.key.split(".experts.experts.")[1].split(".")[0]) for part in parts]
            assert [part.key for part in parts] == [factory.key.replace("*", str(i)) for i in range(8)]
            merged[name] = factory.merge_fn([torch.tensor([float(i + 1)]) for i in indices])
        if torch.distributed.get_rank() == 0:
            torch.save(merged, result)


def trace_nan_gradient(checkpoint: str, flags: list[str], result: str) -> None:
    """Save what the NaN trace finds if the gradient of the second expert of the last rank contains NaN."""
    from worker_job import job

    from megatron_qad.models.builder import build_chunks
    from megatron_qad.models.experts import Experts
    from megatron_qad.training.models import model_config
    from megatron_qad.training.nan_trace import NaNTrace

    sizes = ["--seq-length", "8", "--micro-batch-size", "1", "--global-batch-size", "8"]
    with job(checkpoint, 1, 1, *sizes, *flags) as started:
        chunks = build_chunks(model_config(started.config, started.args, started.config.teacher))
        first = next(module for module in chunks[0].modules() if isinstance(module, Experts))
        first.linear_fc2.weight.grad = torch.zeros_like(first.linear_fc2.weight)
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            first.linear_fc2.weight.grad[1, 0, 0] = torch.nan
        trace = NaNTrace()
        trace.check_gradients(chunks, order=0)
        found = trace.gather()
        if torch.distributed.get_rank() == 0:
            torch.save(found, result)
