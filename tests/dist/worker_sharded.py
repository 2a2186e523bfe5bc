"""Worker: metrics and quantizers with vocabulary and weights sharded over 1, 2 and 4 ranks."""

import torch

from megatron_qad.engine import init_runtime

init_runtime()

from megatron_qad.distillation import VocabShard, compare  # noqa: E402
from megatron_qad.engine import QADError  # noqa: E402
from megatron_qad.formats import nvfp4  # noqa: E402
from megatron_qad.quantization.activations import ActivationQuantizers  # noqa: E402
from megatron_qad.quantization.in_place_weights import InPlaceWeights  # noqa: E402

COLLECTIVES = (
    "all_gather_into_tensor",
    "all_gather",
    "all_reduce",
    "reduce_scatter_tensor",
    "broadcast",
    "all_to_all_single",
)
PADDED, REAL, TOKENS = 64, 30, 21  # of 4 ranks, two have only padding, one has some


class CollectiveCounter:
    """Context manager that counts collectives by name without changing them."""

    def __enter__(self):
        self.calls = {}
        self._originals = {name: getattr(torch.distributed, name) for name in COLLECTIVES}
        for name, original in self._originals.items():
            setattr(torch.distributed, name, self._counting(name, original))
        return self.calls

    def _counting(self, name, original):
        def call(*args, **kwargs):
            self.calls[name] = self.calls.get(name, 0) + 1
            return original(*args, **kwargs)

        return call

    def __exit__(self, *exc):
        for name, original in self._originals.items():
            setattr(torch.distributed, name, original)


def _make_inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, TOKENS // 3, PADDED, generator=generator).mul(3).to(dtype) for _ in range(2))
    student[0, 0, [4, 20]] = 30.0  # a tie of the two most likely tokens, which are on different ranks of four
    teacher[0, 0, 4] = 30.0
    student[0, 1, [4, 20]] = 30.0
    teacher[0, 1, 20] = 30.0
    labels = torch.randint(0, REAL, (3, TOKENS // 3), generator=generator)
    return student, teacher, labels, torch.rand(3, TOKENS // 3, generator=generator)


def _metrics(dtype, group) -> dict:
    student, teacher, labels, weight = _make_inputs(dtype)
    width = PADDED // group.size()
    columns = slice(group.rank() * width, (group.rank() + 1) * width)
    shard = VocabShard.for_rank(width, REAL, group)
    metrics = compare(student[..., columns], teacher[..., columns], labels, (weight > 0.3).float(), shard)
    mask = torch.zeros_like(weight)
    mask[0, :2] = 1
    ties = compare(student[..., columns], teacher[..., columns], labels, mask, shard)
    return {"means": metrics.means(), "ties": ties.means()["top1_agreement"]}


def _one_linear(weight: torch.Tensor) -> torch.nn.Module:
    """Return a module with one linear, named as in a model chunk."""
    chunk, layer = torch.nn.Module(), torch.nn.Module()
    layer.layer_number = 1
    layer.linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.linear.weight.data = weight.clone()
    chunk.decoder = torch.nn.Module()
    chunk.decoder.layers = torch.nn.ModuleList([layer])
    return chunk


NAME = "decoder.layers.0.linear"


def _weights(axis: int, group) -> dict:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    weight[0, 0] = 40.0  # on the first rank only, so that the others alone would choose a smaller scale
    chunk = _one_linear(weight.chunk(group.size(), dim=axis)[group.rank()].contiguous())
    weights = InPlaceWeights([chunk], {f"{NAME}.weight": "nvfp4"}, group)
    with CollectiveCounter() as calls:
        weights.quantize_()
    parts = [torch.empty_like(chunk.decoder.layers[0].linear.weight.data) for _ in range(group.size())]
    torch.distributed.all_gather(parts, chunk.decoder.layers[0].linear.weight.data, group=group)
    expected = nvfp4.fake_quant(weight, nvfp4.global_scale_from_amax(nvfp4.tensor_amax(weight)))
    return {"equal": torch.equal(torch.cat(parts, dim=axis), expected), "calls": calls}


def _inputs(group, value: float) -> dict:
    chunk = _one_linear(torch.ones(16, 32))
    inputs = ActivationQuantizers([chunk], {f"{NAME}.weight": "nvfp4"}, groups=(group,))
    try:
        with inputs.calibrating():
            x = torch.ones(4, 32)
            x[1, 2] = -3.0 - group.rank() if group.rank() else value
            chunk.decoder.layers[0].linear(x)
    except QADError as error:
        return {"error": str(error)}
    return {"amax": inputs.quantizers[NAME]._amax.tolist()}


def _headroom(axis: int, group) -> dict:
    """Each rank sees some rows or some columns of the same input, as in data or tensor parallelism."""
    rows = torch.randn(64, 128, generator=torch.Generator().manual_seed(5)) * torch.logspace(-1, 2, 64).view(-1, 1)
    x = rows.bfloat16().chunk(group.size(), dim=axis)[group.rank()].contiguous()
    chunk = _one_linear(torch.ones(16, x.shape[1]).bfloat16())
    inputs = ActivationQuantizers([chunk], {f"{NAME}.weight": "nvfp4"}, groups=(group,), headroom=16384.0)
    with inputs.calibrating():
        chunk.decoder.layers[0].linear(x)
    return {"amax": inputs.quantizers[NAME]._amax.tolist()}


def cases(arguments: dict) -> list:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    results = []
    for size in (1, 2, 4):
        group = torch.distributed.new_group(list(range(size)))
        if rank >= size:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            results.append({"what": "metrics", "size": size, "dtype": str(dtype)} | _metrics(dtype, group))
        for axis in (0, 1):
            results.append({"what": "weights", "size": size} | _weights(axis, group))
            results.append({"what": "headroom", "size": size} | _headroom(axis, group))
        for value in (-2.0, float("nan")):
            results.append({"what": "inputs", "size": size, "value": value} | _inputs(group, value))
    torch.distributed.barrier()
    return results
