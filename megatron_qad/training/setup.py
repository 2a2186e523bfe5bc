"""Builds the two models of a QAD job: the student that Megatron trains and the frozen teacher beside it."""

import argparse
import os
import shutil
from collections import Counter
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.training.checkpointing import checkpoint_exists
from megatron.training.utils import print_rank_0

from megatron_qad.distillation.hidden_states import HiddenLoss
from megatron_qad.distillation.scale_growth import ScaleGrowth
from megatron_qad.engine import QADError
from megatron_qad.engine.heartbeat import heartbeat
from megatron_qad.engine.run_directory import json_records, manifest, whole_saves
from megatron_qad.engine.run_directory.run_files import JOB_FILE, OF_A_RUN, SMOOTHING_FILE, read_record
from megatron_qad.models.builder import QADModelConfig, build_chunks, freeze
from megatron_qad.models.families import family_of
from megatron_qad.models.run_directory import read_job
from megatron_qad.models.weights import has_amaxes, load_weights, smoothing_record
from megatron_qad.quantization import policy
from megatron_qad.quantization.activations import ActivationQuantizers
from megatron_qad.quantization.weights import InPlaceWeights
from megatron_qad.training import checkpoints, event_record
from megatron_qad.training.arguments import model_config, with_shape_of
from megatron_qad.training.expert_load import expert_load
from megatron_qad.training.guard import Guard, wrap_train_step
from megatron_qad.training.hidden_states import HiddenStates
from megatron_qad.training.loss import job_losses
from megatron_qad.training.outputs import Outputs, check_head
from megatron_qad.training.scale_penalty import ScalePenalty
from megatron_qad.training.schedule import QADStep, wrap_schedule
from megatron_qad.training.streamed_teacher import StreamedTeacher
from megatron_qad.training.teacher import Teacher


def student_config(args: argparse.Namespace) -> QADModelConfig:
    """The config that ``pretrain`` builds the student from. Its hook loads, quantizes and accompanies it."""
    config = model_config(args, args.hf_config)
    config.pre_wrap_hooks.append(lambda chunks: _prepare_student(args, chunks))
    return config


def load_policy(args: argparse.Namespace) -> policy.Policy:
    return policy.load(args.qad.qad_policy, args.qad.qad_rule)


def resolve_formats(args: argparse.Namespace) -> dict[str, str]:
    """The format of every linear of the student, by global Megatron weight name."""
    family = family_of(args.hf_config)
    return policy.resolve(load_policy(args), family.linears(args.hf_config), family.layer_kinds(args.hf_config))


def _prepare_student(args: argparse.Namespace, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Before the student is wrapped: its weights, its quantizers, the teacher, and the schedule that joins them."""
    checkpoints.settle_and_install(args)
    resumes = args.load is not None and checkpoint_exists(args.load)
    start = args.qad.qad_student or args.qad.qad_teacher
    penalties = job_losses().of_kind(ScaleGrowth)
    if not resumes or penalties:
        heartbeat.beat("loading the student", is_long=True)
        load_weights(chunks, start)
    if not resumes:
        print_rank_0(f"megatron_qad: student starts from {start}")
    formats = resolve_formats(args)
    check_head(Outputs.chosen(args.qad), formats)
    event_record.put_into_checkpoints(args)
    if args.save is not None:
        whole_saves.on_first_rank(lambda: describe_checkpoint(args, formats, resumes))
    tp_group = mpu.get_tensor_model_parallel_group()
    data_group = mpu.get_data_parallel_group(with_context_parallel=True)
    activations = ActivationQuantizers(
        chunks,
        formats,
        groups=(tp_group, data_group),
        kv_cache=load_policy(args).kv_cache,
        percentile=args.qad.qad_calibration_percentile,
    )
    if resumes and has_amaxes(args.load):
        activations.expect_amax(device=torch.cuda.current_device())
    heartbeat.beat("loading the teacher", is_long=True)
    teacher = build_teacher(args) if args.teacher_hf_config is not None else None
    if teacher is not None:
        check_apart(teacher.chunks, chunks)
    expert_load.watch(teacher.chunks if teacher is not None else [], chunks)
    expert_group = mpu.get_expert_tensor_parallel_group()
    weights = InPlaceWeights(chunks, formats, tp_group, args.qad.qad_weight_scale_rule, expert_group)
    print_rank_0(f"megatron_qad: {Outputs.chosen(args.qad).describe()}")
    counts = ", ".join(f"{n} {fmt}" for fmt, n in Counter(weights.formats.values()).items()) or "none"
    print_rank_0(f"megatron_qad: weights of this rank on a grid in place: {counts} (policy {args.qad.qad_policy})")
    step = QADStep(teacher, weights, activations, args.qad.qad_calibration_samples)
    if terms := job_losses().of_kind(HiddenLoss):
        patterns = [family_of(config).layer_pattern(config) for config in (args.hf_config, args.teacher_hf_config)]
        step.hidden_states = HiddenStates(terms, chunks, teacher.chunks, tuple(map(len, patterns)))
    if penalties:
        step.scale_penalty = ScalePenalty(penalties, weights)
    wrap_schedule(step)
    wrap_train_step(Guard(step, args.qad.qad_on_nan, args.qad.qad_spike_factor), args)
    heartbeat.beat("Megatron's start: optimizer, checkpoint, index of the data", is_long=True)
    return chunks


def build_teacher(args: argparse.Namespace) -> Teacher:
    """The frozen teacher in BF16 (or the job's precision), in this job's parallel layout, with stages of its own."""
    config = model_config(with_shape_of(args, args.teacher_hf_config), args.teacher_hf_config)
    chunks = build_chunks(config)
    load_weights(chunks, args.qad.qad_teacher)
    print_rank_0(f"megatron_qad: teacher from {args.qad.qad_teacher}, frozen")
    joined = (args.qad.qad_teacher_micro_batch_size or args.micro_batch_size) // args.micro_batch_size
    kind = StreamedTeacher if args.qad.qad_teacher_on_host else Teacher
    return kind([freeze(chunk) for chunk in chunks], joined, Outputs.chosen(args.qad).teacher_hidden)


def check_apart(teacher: list[torch.nn.Module], student: list[torch.nn.Module]) -> None:
    """No parameter of the teacher is one of what DDP, the optimizer and the checkpoint will take theirs from."""
    ids = [{id(p) for chunk in chunks for p in chunk.parameters()} for chunks in (teacher, student)]
    shared = set.intersection(*ids)
    assert not shared, f"{len(shared)} parameters of the teacher are the student's, too"


def _describe_smoothing(start: Path, save: Path, load: Path | None) -> None:
    """Beside the checkpoints, how the weights that they descend from were smoothed."""
    record = smoothing_record(start)
    if load is not None and smoothing_record(load) != record:
        raise QADError(
            f"{load} is of a job whose weights were not smoothed as {start} is ({SMOOTHING_FILE}); it goes on as it "
            "began. Give the --qad-teacher or --qad-student of before, or begin in another --save directory"
        )
    if record is not None:
        json_records.write(save / SMOOTHING_FILE, record)
    else:
        (save / SMOOTHING_FILE).unlink(missing_ok=True)


def _copy_whole(source: str, target: str) -> None:
    """A file that appears when it is whole, and stays if it is there: a vision encoder has a gigabyte."""
    now, then = Path(source).stat(), Path(target).stat() if Path(target).is_file() else None
    if then is None or (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
        partial = f"{target}.partial"
        shutil.copy2(source, partial)  # its time, too
        os.replace(partial, target)


def describe_checkpoint(args: argparse.Namespace, formats: dict[str, str], resumes: bool = False) -> None:
    """Put beside the checkpoints what exporting them needs: the Hugging Face assets and the format of every linear.

    Raises:
        QADError: ``--save`` holds checkpoints of a job with other formats, which ``qad.json`` must go on describing;
            ``--load`` is of a job that began with weights smoothed otherwise.
    """
    save = Path(args.save)
    for name in OF_A_RUN:
        read_record(save, name)  # damage to what this job does not read would go on into its checkpoints
    job = read_job(save)
    if job is not None:
        for what, was, is_now in (
            ("KV cache", job.get("kv_cache", "bf16"), load_policy(args).kv_cache),
            ("--qad-weight-scale-rule", job.get("scale_rule", "max"), args.qad.qad_weight_scale_rule),
        ):
            if was != is_now:
                raise QADError(
                    f"--save {save} holds checkpoints of {what} {was}; this job has {is_now}. Choose another directory "
                    f"or the {what} of before"
                )
        before = job["formats"]
        if differ := sorted(name for name in formats | before if formats.get(name) != before.get(name)):
            name = differ[0]
            raise QADError(
                f"--save {save} holds checkpoints in which {name} is {before.get(name)}; this job's policy makes it "
                f"{formats.get(name)} ({len(differ)} linears differ). Choose another directory or the policy of before"
            )
    start = Path(args.qad.qad_student or args.qad.qad_teacher)
    manifest.require_sealed(start / "hf", "config.json")
    shutil.copytree(start / "hf", save / "hf", dirs_exist_ok=True, copy_function=_copy_whole)
    manifest.require_sealed(save / "hf", "config.json")
    _describe_smoothing(start, save, Path(args.load) if resumes else None)
    job = {
        "policy": args.qad.qad_policy,
        "rules": args.qad.qad_rule,
        "loss": args.qad.qad_loss,
        "kv_cache": load_policy(args).kv_cache,
        "scale_rule": args.qad.qad_weight_scale_rule,
        "formats": formats,
    }
    json_records.write(save / JOB_FILE, job)
