"""Measures the load of each expert in teacher and student, and the share of tokens whose experts differ between them.

It compares the decisions of both models' routers for the same microbatches, in evaluations only. A frozen router
decides differently from the teacher's only if its input has changed, so the share shows how far the student's hidden
states have drifted. Not supported: teachers with other layers or experts, and packed rows in larger teacher
microbatches. Masked tokens, and those that pad the last batch of an evaluation, count like all others.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.core.transformer.moe.router import TopKRouter
from megatron.training import get_tensorboard_writer, is_last_rank, print_rank_last

from megatron_qad.engine.events import Callback
from megatron_qad.engine.run_directory import json_records
from megatron_qad.engine.run_directory.run_files import LOAD_FILE


class ExpertLoad(Callback):
    """Counts router decisions in the current evaluation, by global layer number."""

    def __init__(self, job):
        self._job = job
        self.is_measuring = False
        self._teacher_decisions: dict[int, deque] = defaultdict(deque)  # [s, b, experts], not yet compared
        self._counts: dict[int, torch.Tensor] = {}  # int64 [2, experts + 1]: teacher, student; loads, tokens or changed

    def student_ready(self, student: Sequence[torch.nn.Module]) -> None:
        teacher = self._job.teacher
        self.add_hooks(teacher.chunks if teacher is not None else [], student)

    def forward_begins(self, batches, is_training: bool) -> None:
        self.is_measuring = not is_training

    def evaluation_ended(self, iteration: int, means: dict[str, float]) -> None:
        self.report(iteration)

    def add_hooks(self, teacher: Sequence[torch.nn.Module], student: Sequence[torch.nn.Module]) -> None:
        """Add hooks to the routers of the student, and to those of the teacher in layers where the student has one."""
        teacher_routers, student_routers = (
            [module for chunk in chunks for module in chunk.modules() if isinstance(module, TopKRouter)]
            for chunks in (teacher, student)
        )
        compared = {router.layer_number for router in student_routers}
        for router in student_routers:
            router.register_forward_hook(self._count_student)
        for router in teacher_routers:
            if router.layer_number in compared:
                router.register_forward_hook(self._keep_teacher)

    def _keep_teacher(self, router: TopKRouter, inputs, outputs) -> None:
        if self.is_measuring:
            self._teacher_decisions[router.layer_number].append(outputs[1].unflatten(0, inputs[0].shape[:2]))

    def _count_student(self, router: TopKRouter, inputs, outputs) -> None:
        if not self.is_measuring:
            return
        student = outputs[1].unflatten(0, inputs[0].shape[:2])
        layer, num_experts = router.layer_number, student.shape[-1]
        if layer not in self._counts:
            self._counts[layer] = torch.zeros(2, num_experts + 1, dtype=torch.int64, device=student.device)
        counts = self._counts[layer]
        counts[1, :num_experts] += student.sum((0, 1))
        waiting = self._teacher_decisions[layer]
        if not waiting:
            return
        teacher = waiting.popleft()
        if teacher.shape[1] > student.shape[1]:  # a teacher microbatch holds several of the student's
            waiting.appendleft(teacher[:, student.shape[1] :])
            teacher = teacher[:, : student.shape[1]]
        if teacher.shape == student.shape:
            counts[0, :num_experts] += teacher.sum((0, 1))
            counts[0, num_experts] += student.shape[0] * student.shape[1]
            counts[1, num_experts] += (teacher != student).any(-1).sum()

    def take(self) -> dict[int, dict]:
        """Return and reset the counts of all ranks by layer. Collective.

        "student" and "teacher": tokens of each expert (teacher None if nothing was compared). "compared": number of
        compared tokens. "changed": how many of them have at least one other expert.
        """
        layers = {}
        for layer, counts in sorted(self._counts.items()):
            group = mpu.get_tensor_and_data_parallel_group(with_context_parallel=True)
            torch.distributed.all_reduce(counts, group=group)
            (*teacher, compared), (*student, changed) = counts.tolist()
            layers[layer] = {"student": student, "teacher": teacher if compared else None}
            layers[layer] |= {"compared": compared, "changed": changed}
        self._counts, self._teacher_decisions = {}, defaultdict(deque)
        stages: list[dict] = [{} for _ in range(mpu.get_pipeline_model_parallel_world_size())]
        torch.distributed.all_gather_object(stages, layers, group=mpu.get_pipeline_model_parallel_group())
        return {layer: counts for stage in stages for layer, counts in stage.items()}

    def report(self, iteration: int) -> None:
        """Log and store the counts of the latest evaluation; does nothing for a model without experts."""
        layers = self.take()
        compared = {layer: counts for layer, counts in layers.items() if counts["teacher"] is not None}
        if not layers:
            return
        means = {}
        if compared:
            changed = {layer: counts["changed"] / counts["compared"] for layer, counts in compared.items()}
            most = max(changed, key=changed.get)
            means["changed"] = sum(changed.values()) / len(changed)
            means["busiest_teacher"] = max(busiest(counts["teacher"]) for counts in compared.values())
            where = f" (layer {most - 1}: {changed[most]:.2%})"
        means["busiest_student"] = max(busiest(counts["student"]) for counts in layers.values())
        text = [f"tokens whose experts changed: {means['changed']:.2%}{where}"] if compared else []
        text += [f"busiest expert / mean load, {name[8:]}: {means[name]:.2f}" for name in means if name != "changed"]
        print_rank_last(f" megatron_qad experts at iteration {iteration} | " + " | ".join(text))
        if not is_last_rank():
            return
        if writer := get_tensorboard_writer():
            for name, value in means.items():
                writer.add_scalar(f"experts/{name}", value, iteration)
        if (save := self._job.args.save) is not None and Path(save).is_dir():
            by_index = {str(layer - 1): counts for layer, counts in layers.items()}
            json_records.write_or_warn(Path(save) / LOAD_FILE, {"iteration": iteration, "layers": by_index})


def busiest(load: Sequence[int]) -> float:
    """Return the largest load divided by the mean load: 1 if all experts have the same load."""
    return max(load) * len(load) / max(sum(load), 1)
