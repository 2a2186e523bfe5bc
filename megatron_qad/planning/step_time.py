"""Time of a step, from operations and bytes and from rates that the caller states. Nothing here is measured.

The phases are added as if nothing overlapped. Not counted: the optimizer's update, fake quantization, the vision
encoder, reading data, validation and saving.
"""

from dataclasses import dataclass
from functools import cached_property

from megatron_qad.models.flops import BACKWARD, ForwardFlops, forward_flops
from megatron_qad.planning.layer_sizes import PlannedModel
from megatron_qad.planning.layout import Layout
from megatron_qad.planning.memory import PlannedJob


@dataclass(frozen=True)
class Machine:
    """Assumed rates of the machines."""

    peak: float
    """Peak of dense BF16 products of a GPU, FLOP/s."""
    mfu: float = 0.35
    """Share of the peak that the products reach while they run."""
    gpus_per_node: int = 8
    node_bandwidth: float = 300e9
    """Bytes per second that a GPU sends within its node."""
    network_bandwidth: float = 40e9
    """Bytes per second that a GPU sends to other nodes."""
    host_bandwidth: float = 50e9
    """Bytes per second from host memory to a GPU."""

    def bandwidth(self, num_neighbors: int) -> float:
        """Return the rate within a group of ranks that spans this number of consecutive ranks."""
        return self.node_bandwidth if num_neighbors <= self.gpus_per_node else self.network_bandwidth


@dataclass(frozen=True)
class StepTime:
    """Seconds of each phase of a step."""

    teacher: float
    """The teacher's forward pass, with its output layer."""
    student: float
    """The student's forward and backward pass, with its output layer and recomputation."""
    bubble: float
    """Waiting of pipeline stages for each other, and for the last one, which has the output layers."""
    tensor_traffic: float
    """Tensor- and context-parallel exchange of activations."""
    expert_traffic: float
    """Exchange of tokens between experts."""
    pipeline_traffic: float
    data_traffic: float
    """Reduction of gradients and gathering of weights."""
    host_traffic: float
    """Copies of an offloaded teacher, as far as they take longer than its pass."""

    @property
    def total(self) -> float:
        return sum(vars(self).values())


class ModelCost:
    """Operations and traffic of one model, computed once for many layouts."""

    def __init__(self, model: PlannedModel):
        self.model = model
        self.num_layers = len(model.pattern)
        self.num_experts = model.pattern.count("E")

    @cached_property
    def forward(self) -> ForwardFlops:
        return forward_flops(self.model.family, self.model.hf)

    @cached_property
    def head_per_token(self) -> int:
        """FLOPs of the output layer per token."""
        return 2 * self.model.hidden_size * self.model.vocab_size

    @cached_property
    def key_width(self) -> int:
        """Elements of keys and values per token, over all layers."""
        kv = [
            t["self_attention.linear_qkv.weight"]
            for t in self.model.by_layer
            if "self_attention.linear_qkv.weight" in t
        ]
        return sum(2 * qkv.num_groups * qkv.head_dim for qkv in kv)

    def of_layers(self, num_rows: int, length: int) -> int:
        """Return the FLOPs of the layers, without the output layer, for rows of this length."""
        tokens = num_rows * length
        return self.forward.of_sums(tokens, num_rows * length**2) - self.head_per_token * tokens


class StepTimes:
    """Computes the time of a step of a job in many layouts."""

    def __init__(self, job: PlannedJob, machine: Machine):
        self.job, self.machine = job, machine
        self.student = ModelCost(job.student)
        self.teacher = None if job.teacher is None else ModelCost(job.teacher)

    def flops(self, layout: Layout) -> int:
        """Return the model FLOPs of a step on all ranks, without recomputation."""
        rows, length = layout.global_batch_size, layout.seq_length
        tokens = rows * length
        passes = 1 + BACKWARD if self.job.trains else 1
        total = passes * (self.student.of_layers(rows, length) + self.student.head_per_token * tokens)
        if self.teacher is not None:
            total += self.teacher.of_layers(rows, length) + self.teacher.head_per_token * tokens
        return total

    def of(self, layout: Layout) -> StepTime:
        """Return the time of a step."""
        job, machine = self.job, self.machine
        rate = machine.peak * machine.mfu * layout.world_size
        rows, length = layout.global_batch_size, layout.seq_length
        tokens = rows * length
        passes = 1 + BACKWARD if job.trains else 1
        again = 1 if layout.recompute == "full" and job.trains else 0
        student = (
            (passes + again) * self.student.of_layers(rows, length) / rate,
            passes * self.student.head_per_token * tokens / rate,
        )
        teacher = (0.0, 0.0)
        if self.teacher is not None:
            teacher = (self.teacher.of_layers(rows, length) / rate, self.teacher.head_per_token * tokens / rate)
        num, pp = layout.num_microbatches, layout.pp
        # A pipeline of pp stages fills and drains once per step; the last stage alone has the output layer.
        bubble = (pp - 1) * (student[0] / (num * layout.vpp) + student[1] + teacher[1])
        if self.teacher is not None:
            # An offloaded teacher's stages run one after the other, each for all microbatches.
            share = 1 if job.offloads_teacher else 1 / (num * job.teacher_virtual_stages(layout))
            bubble += (pp - 1) * teacher[0] * share
        sends = {name: sum(parts) for name, parts in self._traffic(layout, passes, again).items()}
        host = 0.0
        if job.offloads_teacher:
            copied = job.teacher_params.on_ranks(layout, 1)[0].total * layout.element_bytes
            host = max(0.0, copied / machine.host_bandwidth - sum(teacher))
        return StepTime(sum(teacher), sum(student), bubble, **sends, host_traffic=host)

    def _traffic(self, layout: Layout, passes: int, again: int) -> dict[str, list[float]]:
        """Return the seconds of each kind of traffic, of both models."""
        machine, width, num = self.machine, layout.element_bytes, layout.num_microbatches
        traffic = {"tensor_traffic": [], "expert_traffic": [], "pipeline_traffic": [], "data_traffic": []}
        # Student: forward, backward, and forward again. Sequence parallelism gathers inputs again for the gradients.
        student_passes = (1 + again) * 2 + (2 + layout.sequence_parallel) * (passes > 1)
        for cost, tensor_units, directions in ((self.student, student_passes, passes > 1), (self.teacher, 2, False)):
            if cost is None:
                continue
            hidden = layout.tokens * cost.model.hidden_size * width * num
            layers = cost.num_layers / layout.pp
            sent = tensor_units * layers * hidden * (layout.tp - 1) / layout.tp
            traffic["tensor_traffic"].append(sent / machine.bandwidth(layout.tp))
            turns = 1 + directions + (again if directions else 0)
            keys = cost.key_width / layout.tp / layout.pp * layout.tokens * width * num * (layout.cp - 1)
            traffic["tensor_traffic"].append(turns * keys / machine.bandwidth(layout.tp * layout.cp))
            if cost.num_experts:
                top_k = cost.model.args["moe-router-topk"]
                routed = layout.sharded_tokens * top_k * self._expert_width(cost) * width * num
                remote = (layout.ep - 1) / layout.ep
                sent = 2 * turns * cost.num_experts / layout.pp * routed * remote
                traffic["expert_traffic"].append(sent / machine.bandwidth(layout.ep * layout.etp))
            if layout.pp > 1:
                sent = (1 + directions) * layout.sharded_tokens * cost.model.hidden_size * width * num * layout.vpp
                traffic["pipeline_traffic"].append(sent / machine.bandwidth(layout.world_size))
        if self.job.trains:
            traffic["data_traffic"] += self._data_traffic(layout)
        return traffic

    @staticmethod
    def _expert_width(cost: ModelCost) -> int:
        return cost.model.args.get("moe-latent-size") or cost.model.hidden_size

    def _data_traffic(self, layout: Layout) -> list[float]:
        """Gradients are reduced and scattered, weights gathered: each rank sends almost all of its own once."""
        per_element = layout.gradient_bytes + layout.element_bytes
        params = max(self.job.student_params.on_ranks(layout), key=lambda rank: rank.total)
        seconds = []
        for numel, copies in ((params.dense, layout.dp * layout.cp), (params.experts, layout.num_expert_copies)):
            span = layout.world_size // layout.pp
            seconds.append(numel * per_element * (copies - 1) / copies / self.machine.bandwidth(span))
        return seconds
