"""``megatron-qad``: help, typos and wrong paths, answered without torch; the tables that this needs are current."""

import dataclasses
import importlib
import importlib.metadata
import subprocess
import sys

import pytest

from megatron_qad.cli import launcher
from megatron_qad.cli.command_table import COMMANDS, module_of
from megatron_qad.cli.early_checks import FLAG_NAMES, check_job_flags, flag_values
from megatron_qad.cli.job_help import MEGATRON_FLAGS, qad_flags
from megatron_qad.cli.main import run
from megatron_qad.config.qad_options import QADOptions
from megatron_qad.engine.errors import QADError

WITHOUT_TORCH = """
import sys
for package in ("torch", "megatron", "transformers", "modelopt", "datasets"):
    sys.modules[package] = None  # makes an import of it fail
from megatron_qad.cli.main import main
main(sys.argv[1:])
"""


def megatron_qad(*words: str) -> subprocess.CompletedProcess:
    """Run a command line in a process that cannot import torch."""
    return subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *words], capture_output=True, text=True, timeout=60)


def test_help_lists_all_commands():
    done = megatron_qad("--help")
    assert done.returncode == 0, done.stderr
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert listed == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_needs_no_torch(command):
    done = megatron_qad(command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: megatron-qad {command} ")
    assert "docs/" not in done.stdout or "tools/" not in done.stdout


@pytest.mark.parametrize(
    "words, error",
    [
        (["traun"], "megatron-qad traun: no such command. Did you mean 'train'?"),
        (["train", "--qad-techer", "x"], "--qad-techer: no such flag; did you mean '--qad-teacher'?"),
        (["train", "--learning-rate", "1"], "--learning-rate: no such flag; did you mean '--lr'?"),
        (["train", "--reset-position-ids"], "has no effect in this version of Megatron"),
        (["ptq", "--qad-teacher", "/none"], "/none: no hf/config.json. Expected a checkpoint directory"),
        (["train", "--config", "/none.yaml"], "--config /none.yaml: no such file"),
        (["train", "--train-data-path", "0.5", "/none"], "--data-path /none: /none.bin and /none.idx not found"),
        (["train", "--qad-policy", "nvfp4-all-liner"], "did you mean 'nvfp4-all-linear'?"),
        (["smooth", "--outptu", "x"], "--outptu: no such flag; did you mean '--output'?"),
        (["train", "--nproc-per-node", "two"], "--nproc-per-node two: expected a whole number"),
        (["run", "--model", "/none", "--chats", "/x", "--output", "/y"], "--model /none: no config.json"),
    ],
)
def test_mistakes_are_reported_without_torch(words, error):
    done = megatron_qad(*words)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and error in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


def test_no_flag_of_a_command_is_one_of_a_job_with_another_meaning():
    """Commands that take the flags of a job would hide them."""
    names = set(FLAG_NAMES.read_text().split()[1:])
    for command, about in COMMANDS.items():
        if about.takes_job_flags and hasattr(module := importlib.import_module(module_of(command)), "make_parser"):
            own = {option for action in module.make_parser()._actions for option in action.option_strings}
            assert not own & names - {"--help"}, command


def test_short_help_names_every_flag_of_ours_and_existing_ones_of_megatron(megatron_parser):
    fields = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(QADOptions)}
    assert qad_flags().keys() == fields and all(qad_flags().values())
    known = {option for action in megatron_parser._actions for option in action.option_strings} | {"--config"}
    shown = {flag.split()[0] for flags in MEGATRON_FLAGS.values() for flag in flags}
    assert shown <= known


@pytest.fixture(scope="module")
def megatron_parser():
    from megatron_qad.engine import init_runtime

    init_runtime(for_compute=True)
    from megatron_qad.engine.megatron_args import make_parser

    return make_parser(QADOptions)


def test_flag_values():
    words = ["--lr", "1e-5", "--bf16", "--data-path=x", "--qad-policy-override", "a=b", "c=d", "--x", "-1"]
    assert flag_values(words) == [
        ("--lr", ["1e-5"]),
        ("--bf16", []),
        ("--data-path", ["x"]),
        ("--qad-policy-override", ["a=b", "c=d"]),
        ("--x", ["-1"]),
    ]


def test_other_versions_of_megatron_are_not_refused_by_name(monkeypatch):
    """The table is for one version; for others the job itself checks the names."""
    from megatron_qad.cli import early_checks

    monkeypatch.setattr(early_checks, "_known_flags", lambda: None)
    check_job_flags("train", ["--a-flag-of-tomorrow", "1"])
    with pytest.raises(QADError, match="no such file"):
        check_job_flags("train", ["--config", "/none.yaml"])


def test_commands_that_use_all_gpus_are_started_by_torchrun():
    assert launcher.command_line("export") == [sys.executable, "-m", "megatron_qad.cli", "export"]
    script, *words = launcher.command_line("train")
    assert script.endswith("/launch/torchrun.sh") and words == ["-m", "megatron_qad.cli", "train"]


def test_a_rank_runs_the_command_itself(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0"), monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(launcher, "replace_with_ranks", lambda *_: pytest.fail("a rank started ranks"))
    run(["ptq", "--help"])
    assert "usage: megatron-qad ptq" in capsys.readouterr().out
