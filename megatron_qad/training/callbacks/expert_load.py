"""Where tokens go: the load of every expert in teacher and student, and how many tokens are sent elsewhere.

Measured in evaluations, from what the routers of both models decide for the same microbatches; training is left alone.
A frozen router decides otherwise than the teacher's only because its input moved, so that the share of tokens whose
experts changed says how far the student has drifted inside. Left out: a teacher with other layers or experts, which has
no counterpart to compare with, and packed rows that the teacher takes in larger microbatches. Masked tokens are counted
like others, also those that fill an evaluation's last batch.
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
    """Counts of the evaluation that is running, by global layer number."""

    def __init__(self, job):
        self._job = job
        self.is_measuring = False
        self._of_teacher: dict[int, deque] = defaultdict(deque)  # decisions [s, b, experts] yet to be compared
        self._counts: dict[int, torch.Tensor] = {}  # int64 [2, experts + 1]: teacher, student; loads, tokens or changed

    def student_ready(self, student: Sequence[torch.nn.Module]) -> None:
        teacher = self._job.teacher
        self.watch(teacher.chunks if teacher is not None else [], student)

    def forward_begins(self, batches, is_training: bool) -> None:
        self.is_measuring = not is_training

    def evaluation_ended(self, iteration: int, means: dict[str, float]) -> None:
        self.report(iteration)

    def watch(self, teacher: Sequence[torch.nn.Module], student: Sequence[torch.nn.Module]) -> None:
        """Listen to the routers of these model chunks; to the teacher's where the student has one in that layer."""
        of_teacher, of_student = (
            [module for chunk in chunks for module in chunk.modules() if isinstance(module, TopKRouter)]
            for chunks in (teacher, student)
        )
        compared = {router.layer_number for router in of_student}
        for router in of_student:
            router.register_forward_hook(self._student_decides)
        for router in of_teacher:
            if router.layer_number in compared:
                router.register_forward_hook(self._teacher_decides)

    def _teacher_decides(self, router: TopKRouter, inputs, outputs) -> None:
        if self.is_measuring:
            self._of_teacher[router.layer_number].append(outputs[1].unflatten(0, inputs[0].shape[:2]))

    def _student_decides(self, router: TopKRouter, inputs, outputs) -> None:
        if not self.is_measuring:
            return
        decided = outputs[1].unflatten(0, inputs[0].shape[:2])
        layer, experts = router.layer_number, decided.shape[-1]
        if layer not in self._counts:
            self._counts[layer] = torch.zeros(2, experts + 1, dtype=torch.int64, device=decided.device)
        counts = self._counts[layer]
        counts[1, :experts] += decided.sum((0, 1))
        waiting = self._of_teacher[layer]
        if not waiting:
            return
        of_teacher = waiting.popleft()
        if of_teacher.shape[1] > decided.shape[1]:  # the teacher takes several of the student's microbatches at a time
            waiting.appendleft(of_teacher[:, decided.shape[1] :])
            of_teacher = of_teacher[:, : decided.shape[1]]
        if of_teacher.shape == decided.shape:
            counts[0, :experts] += of_teacher.sum((0, 1))
            counts[0, experts] += decided.shape[0] * decided.shape[1]
            counts[1, experts] += (of_teacher != decided).any(-1).sum()

    def take(self) -> dict[int, dict]:
        """Of all ranks, by layer: "student" and "teacher" (tokens of each expert; teacher None where it was not
        compared), "compared" tokens, and how many of them "changed" at least one of their experts. Called by all."""
        found = {}
        for layer, counts in sorted(self._counts.items()):
            group = mpu.get_tensor_and_data_parallel_group(with_context_parallel=True)
            torch.distributed.all_reduce(counts, group=group)
            (*teacher, compared), (*student, changed) = counts.tolist()
            found[layer] = {"student": student, "teacher": teacher if compared else None}
            found[layer] |= {"compared": compared, "changed": changed}
        self._counts, self._of_teacher = {}, defaultdict(deque)
        stages: list[dict] = [{} for _ in range(mpu.get_pipeline_model_parallel_world_size())]
        torch.distributed.all_gather_object(stages, found, group=mpu.get_pipeline_model_parallel_group())
        return {layer: counts for stage in stages for layer, counts in stage.items()}

    def report(self, iteration: int) -> None:
        """Log and store the evaluation that just ran; nothing for a model without experts."""
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
        text += [f"busiest expert, of a mean load, {who[8:]}: {means[who]:.2f}" for who in means if who != "changed"]
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
    """The largest load over the mean one; 1 if all are alike."""
    return max(load) * len(load) / max(sum(load), 1)
