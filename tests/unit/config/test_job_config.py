"""A command line is read into one frozen configuration, without Megatron and without side effects."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from tiny_configs import TINY_HYBRID, TINY_LLAMA

from megatron_qad.config.job_config import read_job_config
from megatron_qad.config.megatron_flags import MegatronFlags
from megatron_qad.config.model_config import ModelConfig
from megatron_qad.config.qad_options import QADOptions
from megatron_qad.engine import Capabilities, QADError
from megatron_qad.engine.run_directory import manifest

ROOT = Path(__file__).parents[3]
CPU = Capabilities("cpu", "gloo", "local", "torch", "torch", False, ())


def parser_for(*option_classes: type) -> argparse.ArgumentParser:
    """Return a parser with a flag for each field of the dataclasses, as Megatron's own parser has them."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for option_class in option_classes:
        hints = typing.get_type_hints(option_class)
        for field in dataclasses.fields(option_class):
            hint, name = str(hints[field.name]), f"--{field.name.replace('_', '-')}"
            default = field.default_factory() if field.default is dataclasses.MISSING else field.default
            if hints[field.name] is bool or "bool" in hint:
                parser.add_argument(name, action="store_true", default=default)
            elif "list" in hint and "float" not in hint:
                value_type = str if "str" in hint else int
                parser.add_argument(name, nargs="+", type=value_type, default=default)
            else:
                value_type = int if "int" in hint else float if "float" in hint else str
                parser.add_argument(name, type=value_type, default=default)
    return parser


@pytest.fixture
def checkpoint(tmp_path) -> str:
    """A checkpoint directory with the files that ``read_job_config`` reads."""
    hf = tmp_path / "model" / "hf"
    hf.mkdir(parents=True)
    (hf / "config.json").write_text(json.dumps(TINY_LLAMA | {"max_position_embeddings": 64}))
    manifest.write_manifest(hf)
    return str(tmp_path / "model")


@pytest.fixture
def read(checkpoint):
    """read(*flags, world=1) returns the configuration of a job with the tiny model."""

    def make(*flags, world: int = 1, teacher: str = checkpoint, trains: bool = True, student=None, **environ):
        sizes = ["--seq-length", "32", "--micro-batch-size", "2", "--train-iters", "8", "--lr", "1e-4"]
        argv = ["--qad-teacher", teacher, *sizes, *flags]
        parser = parser_for(MegatronFlags, QADOptions)
        environ = {"WORLD_SIZE": str(world), **environ}
        return read_job_config(argv, parser, CPU, environ, trains=trains, student=student)

    return make


def test_defaults_are_resolved(read, checkpoint):
    config = read("--bf16", "--dataloader-inter-document-masking", "--context-parallel-size", "2", world=4)
    assert (config.world_size, config.flags.global_batch_size) == (4, 4)  # two data-parallel ranks
    assert config.options.qad_pad_documents_to == 4 and config.layer_spec == "local"
    assert config.student.checkpoint == config.teacher.checkpoint == checkpoint
    assert set(config.formats.values()) == {"nvfp4", "bf16"} and config.policy.name == "nvfp4-all-linear"
    assert [term.name for term in config.losses.terms] == ["kl"]
    assert "--transformer-impl" in config.megatron_argv and "--hybrid-layer-pattern" in config.megatron_argv


def test_user_flags_come_last_and_win(read):
    argv = read("--save-interval", "7").megatron_argv
    values = [argv[i + 1] for i, word in enumerate(argv) if word == "--save-interval"]
    assert values == ["1000", "7"]


def test_layer_pattern_contains_virtual_stages(read):
    flags = ("--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2")
    config = read(*flags, "--global-batch-size", "8", world=2)
    pattern = config.megatron_argv[config.megatron_argv.index("--hybrid-layer-pattern") + 1]
    assert pattern.count("|") == 3 and "--num-virtual-stages-per-pipeline-rank" not in config.megatron_argv


def test_four_over_six_for_mamba_is_a_note(read, checkpoint):
    """Also if the rule comes from the flag. An override that gives Mamba another rule ends it."""
    hf = Path(checkpoint) / "hf"
    (hf / "config.json").write_text(json.dumps(TINY_HYBRID | {"model_type": "nemotron_h", "num_experts_per_tok": 2}))
    manifest.write_manifest(hf)

    def warnings(*flags):
        return [note for note in read("--qad-weight-scale-rule", "four_over_six", *flags).notes if "84.7%" in note]

    (warning,) = warnings()
    assert warning.startswith("WARNING: decoder.layers.0.mixer.in_proj and 3 more: Mamba weights")
    assert not warnings("--qad-policy-override", "mamba=nvfp4:max")


def test_job_with_a_checkpoint_resumes(read, tmp_path):
    save = tmp_path / "run"
    assert read("--save", str(save)).flags.load is None
    (save / "iter_0000003").mkdir(parents=True)
    config = read("--save", str(save))
    assert config.flags.load == str(save) and config.megatron_argv[-2:] == ("--load", str(save))
    (save / "iter_0000003").rename(save / "iter_0000001")
    assert read("--save", str(save), "--qad-ptq").flags.load is None  # PTQ never resumes


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--micro-batch-size", "3", "--global-batch-size", "4"], "--global-batch-size 4 is not a multiple of 3"),
        (["--qad-weight-scale-rule", "best"], "--qad-weight-scale-rule: found scales 'best', expected one of max"),
        (["--qad-weight-scale-rule", "mse:never"], "found scales 'mse:never'"),
        (["--qad-calibration-percentile", "0"], "--qad-calibration-percentile 0.0: expected a number above 0"),
        (["--qad-calibration-headroom", "28672"], "--qad-calibration-headroom 28672.0: expected a number above 0 and"),
        (
            ["--qad-calibration-headroom", "9", "--qad-calibration-percentile", "99"],
            "--qad-calibration-percentile and --qad-calibration-headroom both set the amax",
        ),
        (
            ["--qad-calibration-headroom", "16384", "--qad-policy", "w4a16-all-linear"],
            "--qad-calibration-headroom 16384: the policy w4a16-all-linear gives no linear NVFP4 inputs",
        ),
        (["--seq-length", "128"], "--seq-length 128: is longer than the 64 positions of"),
        (["--qad-policy", "nothing"], "no quantization policy 'nothing'"),
        (["--qad-policy-override", "no_such_module=fp8"], "policy rule no_such_module=fp8 matches no linear"),
        (
            ["--qad-policy-override", "decoder.layers.1.*=int4-w4a16"],
            "linear_fc1.weight: its shard has 64 columns; int4-w4a16 needs a multiple of 128",
        ),
        (["--qad-loss", "topk(k=4096)"], "k must not exceed the"),
        (["--qad-fused-linear-loss", "always", "--qad-loss", "jsd"], "jsd reads all logits twice"),
        (["--qad-job-dir", "/nowhere"], "--qad-job-dir /nowhere: no such directory"),
        (["--qad-keep-best", "2", "--save", "run", "--eval-iters", "0"], "--eval-iters 0 turns validation off"),
        (["--qad-spike-factor", "5"], "--qad-spike-factor 5: expected more than 1, and --save"),
        (["--tensor-model-parallel-size", "0"], "--tensor-model-parallel-size 0: expected a number of 1 or more"),
        (["--qad-teacher-micro-batch-size", "0"], "--qad-teacher-micro-batch-size 0: expected a number of 1"),
        (["--make-vocab-size-divisible-by", "0"], "--make-vocab-size-divisible-by 0: expected a number of 1"),
        (["--fp16"], "--fp16 skips steps whose gradients overflow"),
        (["--ckpt-format", "torch"], "--ckpt-format torch is not supported"),
    ],
)
def test_invalid_flags_are_rejected(read, flags, message):
    with pytest.raises(QADError) as error:
        read(*flags)
    assert message in str(error.value)


def test_missing_shape_of_a_microbatch_gets_a_default(checkpoint):
    """The models' longest sequence, as a multiple of what the parallelism needs; the notes say what was chosen."""
    argv = ["--qad-teacher", checkpoint, "--train-iters", "8", "--lr", "1e-4"]
    parser = parser_for(MegatronFlags, QADOptions)
    config = read_job_config(argv, parser, CPU, {})
    assert (config.flags.seq_length, config.flags.micro_batch_size) == (64, 1)
    assert config.megatron_argv[-4:] == ("--seq-length", "64", "--micro-batch-size", "1")
    seq_length, micro_batch_size, *_, no_save = config.notes
    assert seq_length.startswith(f"--seq-length 64, because none was given (64 positions in {checkpoint}")
    assert micro_batch_size.startswith("--micro-batch-size 1, because none was given")
    three = ["--context-parallel-size", "3"]  # rows must be a multiple of 6 tokens
    assert read_job_config([*argv, *three], parser, CPU, {"WORLD_SIZE": "3"}).flags.seq_length == 60


def test_job_that_keeps_nothing_says_so(read):
    chosen = ("--bf16", "--global-batch-size", "4", "--save-interval", "4")
    (warning,) = read(*chosen).notes
    assert warning.startswith("WARNING: no --save: this job keeps nothing.")
    assert read(*chosen, "--save", "run").notes == read(*chosen, "--skip-train").notes == ()


@pytest.mark.parametrize(
    "flags, note",
    [
        (["--bf16"], "--global-batch-size: none was given, so a step has one microbatch per data-parallel rank"),
        (["--global-batch-size", "4"], "weights and activations in float32, because --bf16 was not given"),
        (["--bf16", "--data-path", "prefix"], "--split 969,30,1, because none was given: 3% of the data is held out"),
        (["--bf16", "--save", "run"], "--save-interval 1000: the only checkpoint is the one after the last step"),
    ],
)
def test_defaults_that_surprise_are_noted(read, flags, note):
    assert any(line.startswith(note) for line in read(*flags).notes)
    chosen = ("--bf16", "--global-batch-size", "4", "--split", "9,1,0", "--save", "run", "--save-interval", "4")
    assert not any(line.startswith(note.split(" ")[0]) for line in read(*flags, *chosen).notes)


def test_dry_run_refuses_a_save_directory_that_cannot_be_written(read, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(QADError, match=r"--save .*file/run: cannot be written \(Not a directory: .*file\)"):
        read("--qad-dry-run", "--save", f"{tmp_path}/file/run")
    read("--qad-dry-run", "--save", f"{tmp_path}/new/run")
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to every directory")
def test_dry_run_refuses_a_read_only_save_directory(read, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(QADError, match="cannot be written .no permission to write"):
        read("--qad-dry-run", "--save", f"{tmp_path}/run")


def test_tensorboard_events_are_next_to_the_checkpoints(read):
    assert read("--save", "run").flags.tensorboard_dir == "run/tensorboard"
    assert read("--save", "run", "--tensorboard-dir", "events").flags.tensorboard_dir == "events"
    assert read("--save", "run", "--tensorboard-dir", "").flags.tensorboard_dir == ""  # turned off
    assert read().flags.tensorboard_dir is None


def test_ptq_ignores_the_schedule_of_a_training(read):
    """A script gives the flags of a training to its PTQ job, too; Megatron refuses half of them at learning rate 0."""
    schedule = ["--lr-warmup-init", "1e-6", "--lr-warmup-fraction", "0.1", "--lr-decay-iters", "6", "--min-lr", "1e-5"]
    config = read("--qad-ptq", *schedule, "--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "3")
    flags = config.flags
    assert (flags.train_iters, flags.lr, flags.min_lr, flags.lr_warmup_init, flags.lr_warmup_iters) == (1, 0, 0, 0, 0)
    assert (flags.lr_warmup_fraction, flags.lr_decay_iters, flags.lr_decay_style) == (None, None, "linear")
    samples = ["--train-samples", "64", "--lr-decay-samples", "64", "--lr-warmup-samples", "8"]
    assert read("--qad-ptq", *samples).flags.train_samples is None


def test_tool_with_a_student_of_its_own_ignores_the_formats_and_the_loss(read, checkpoint):
    """The flags would otherwise be refused: the student does not exist, and its policy has no input with headroom."""
    student = ModelConfig("exports/qad", read().student.hf)
    flags = ["--qad-student", "none", "--qad-policy", "none.yaml", "--qad-policy-override", "head=nvfp4", "mlp=fp8"]
    flags += ["--qad-policy-override=attention=fp8", "--qad-loss", "ce + scale_growth", "--qad-ptq"]
    flags += ["--qad-calibration-headroom", "99", "--qad-weight-scale-rule", "local_hessian", "--eval-iters", "3"]
    config = read(*flags, trains=False, student=student)
    assert config.student is student and config.teacher.checkpoint == checkpoint
    assert set(config.formats.values()) == {"bf16"} and config.options.qad_loss == "kl"
    assert not config.options.qad_ptq and config.flags.eval_iters == 3


def test_configuration_is_frozen(read):
    config = read()
    for part in (
        config,
        config.options,
        config.flags,
        config.student,
        config.losses,
        config.policy,
        config.output_mode,
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, dataclasses.fields(part)[0].name, None)


def test_defaults_equal_those_of_megatron():
    from megatron_qad.engine import init_runtime

    init_runtime()
    from megatron_qad.engine.megatron_args import make_parser

    megatron_defaults = MegatronFlags.from_args(make_parser(QADOptions).parse_args([]))
    assert dataclasses.replace(megatron_defaults, eval_iters=None) == MegatronFlags()
    assert megatron_defaults.eval_iters == 100  # ours is None, which means that the user set none


PURE = """
import json, os, sys
for package in ("megatron", "modelopt", "transformer_engine"):
    sys.modules[package] = None  # makes an import of it fail
sys.path[:0] = [{tests!r}, {here!r}]
from test_job_config import CPU, MegatronFlags, QADOptions, parser_for, read_job_config
before = dict(os.environ), list(sys.argv), sorted(os.listdir("."))
argv = ["--qad-teacher", {checkpoint!r}, "--train-iters", "8", "--lr", "1e-4", "--save", "run", "--bf16",
        "--wandb-project", "p", "--tensorboard-dir", "events"]
config = read_job_config(argv, parser_for(MegatronFlags, QADOptions), CPU, {{"WORLD_SIZE": "2"}})
assert (dict(os.environ), list(sys.argv), sorted(os.listdir("."))) == before
print(json.dumps(sorted(set(config.formats.values()))))
"""


def test_reading_has_no_side_effects_and_needs_no_megatron(checkpoint, tmp_path):
    """Runs in a process that cannot import Megatron, in an empty directory, which must stay empty."""
    empty = tmp_path / "empty"
    empty.mkdir()
    code = PURE.format(tests=str(ROOT / "tests"), here=str(Path(__file__).parent), checkpoint=checkpoint)
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=empty, timeout=120)
    assert not done.returncode, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == ["bf16", "nvfp4"]
