"""Each shell command of README.md and docs/ is accepted by the parser of its program.

Words in capitals and ``...`` stand for values; a command with ``...`` may lack required flags. Nothing is run.
"""

import argparse
import importlib
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from example_modules import imports_of_examples
from shell_commands import Command, commands_of

from megatron_qad.cli.command_table import COMMANDS, module_of
from megatron_qad.config.command_line import check_flags_exist
from megatron_qad.config.qad_options import QADOptions
from megatron_qad.config.yaml_file import expand
from megatron_qad.engine import QADError, init_runtime

init_runtime(for_compute=True)

from megatron_qad.engine.megatron_args import make_parser  # noqa: E402

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
# Pages of runs and trials have the commands of their time.
HISTORY = re.compile(r"lab_log\.md|walkthroughs\.md|benchmarks/2\d{3}-")
EXTERNAL = {"vllm", "source", "tail", "squeue", "scancel", "tensorboard"}
_PARSE, _PARSE_KNOWN = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args


class Parsed(BaseException):
    """Ends a program when it has parsed its command line."""

    def __init__(self, rest: list[str], takes_job_flags: bool):
        self.rest, self.takes_job_flags = rest, takes_job_flags


def is_placeholder(word: object) -> bool:
    return isinstance(word, str) and word.isupper()


def accept_placeholders(parser: argparse.ArgumentParser, is_partial: bool) -> None:
    """Let words in capitals be values of any type. If the command is partial, make flags and their values optional."""
    for group in parser._mutually_exclusive_groups:
        group.required = group.required and not is_partial
    for action in parser._actions:
        action.required = action.required and not is_partial
        if is_partial and action.option_strings:
            action.nargs = {None: "?", "+": "*"}.get(action.nargs, action.nargs)
        if callable(action.type):
            convert = action.type
            action.type = lambda word, convert=convert: word if is_placeholder(word) else convert(word)
            action.type.__name__ = getattr(convert, "__name__", "value")


@pytest.fixture(scope="module")
def job_parser() -> argparse.ArgumentParser:
    parser = make_parser(QADOptions)
    accept_placeholders(parser, is_partial=True)
    return parser


@pytest.fixture
def check(monkeypatch, capsys, job_parser):
    """Return a function that parses one command, and raises an error if its program would not accept it."""

    def script(path: str, argv: list[str], is_partial: bool) -> None:
        assert (ROOT / path).is_file(), f"{path} does not exist"
        if path == "pretrain_qad.py" or not argv:
            return job_flags(argv)
        program(lambda: runpy.run_path(str(ROOT / path), run_name="program")["main"], argv, is_partial)

    def subcommand(name: str, argv: list[str], is_partial: bool) -> None:
        if name.startswith("--") or is_placeholder(name):
            return
        assert name in COMMANDS, f"megatron-qad has no command {name}"
        if COMMANDS[name].uses_all_gpus and "--nproc-per-node" in argv:
            start = argv.index("--nproc-per-node")
            del argv[start : start + 2]
        if name in ("train", "ptq"):
            return job_flags(argv)
        program(lambda: importlib.import_module(module_of(name)).main, argv, is_partial)

    def program(find_main: Callable[[], Callable], argv: list[str], is_partial: bool) -> None:
        if "--help" in argv or "--help-all" in argv:
            return

        def parse(parser, takes_job_flags: bool):
            accept_placeholders(parser, is_partial)
            raise Parsed(_PARSE_KNOWN(parser, argv)[1], takes_job_flags)

        with imports_of_examples(), monkeypatch.context() as patch:
            patch.syspath_prepend(ROOT / "tools")
            patch.setattr(sys, "argv", ["program", *argv])
            patch.setattr(argparse.ArgumentParser, "parse_args", lambda parser, *_, **__: parse(parser, False))
            patch.setattr(argparse.ArgumentParser, "parse_known_args", lambda parser, *_, **__: parse(parser, True))
            try:
                find_main()()
            except Parsed as parsed:
                rest, takes_job_flags = parsed.rest, parsed.takes_job_flags
            except SystemExit as end:
                raise AssertionError(capsys.readouterr().err) from end
        if takes_job_flags:
            job_flags(rest)
        else:
            assert not rest, f"unknown: {rest}"

    def job_flags(argv: list[str]) -> None:
        argv = [word for word in argv if word not in ("--help", "--help-all")]
        for i, word in reversed(list(enumerate(argv))):
            if word == "--config" and not (ROOT / argv[i + 1]).is_file():
                assert not argv[i + 1].startswith("examples/"), f"{argv[i + 1]} does not exist"
                del argv[i : i + 2]
        argv = [str(ROOT / word) if word.startswith("examples/") else word for word in argv]
        argv = expand(argv, job_parser)
        check_flags_exist(argv, job_parser)

    def call(words: list[str], is_partial: bool) -> None:
        name, rest = words[0], list(words[1:])
        if name == "megatron-qad":
            subcommand(rest[0], rest[1:], is_partial)
        elif name.endswith("pipeline.sbatch"):
            job_flags(rest)
        elif name.startswith("launch/"):
            assert (ROOT / name).is_file(), name
            if rest:
                script(rest[0], rest[1:], is_partial)
        elif name.endswith(".py"):
            script(name, rest, is_partial)
        elif name in ("python", "bash"):
            if not rest[0].startswith("-"):
                call(rest, is_partial)
        elif name in ("torchrun", "sbatch", "srun"):
            start = next((i for i, word in enumerate(rest) if word.endswith((".py", ".sbatch", ".sh"))), None)
            if "--wrap" in rest:
                call(rest[rest.index("--wrap") + 1].split(), is_partial)
            elif start is not None:
                call(rest[start:], is_partial)
        elif name.endswith("recipes/run.sh"):
            assert rest[0].isupper() or is_partial or (ROOT / rest[0]).is_file(), rest[0]
            first = next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))
            job_flags(rest[first:])
        elif name.startswith("examples/"):
            assert (ROOT / name).is_file(), name
        elif name == "make":
            targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
            assert {word for word in rest if "=" not in word} <= targets, rest
        elif name == "pytest":
            paths = [word.split("::")[0] for word in rest if not word.startswith("-") and "/" in word]
            assert all((ROOT / path).exists() for path in paths if "..." not in path), paths
        elif name == "pip":
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set(re.findall(r"\[(\w[\w-]*)\]", " ".join(rest))) <= extras.keys(), rest
        elif name == "hf":
            command = [sys.executable, "-m", "huggingface_hub.cli.hf", rest[0], "--help"]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            assert all(word in text for word in rest if word.startswith("--")), rest
        else:
            assert name in EXTERNAL, f"{name}: no parser is known for this program"

    def check_command(command: Command) -> None:
        given = [word.removeprefix("[") for word in command.words if word != "..."]
        given = [word if "[" in word else word.removesuffix("]") for word in given]
        call(given, "..." in command.line or not command.is_block)

    return check_command


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if not HISTORY.search(str(page)) and commands_of(page)],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_commands_of_pages_are_parsed(page, check):
    wrong = []
    for command in commands_of(page):
        try:
            check(command)
        except (AssertionError, QADError) as error:
            wrong.append(f"{command.line}\n    {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        "megatron-qad train --trian-iters 3",
        "megatron-qad plan --hf-model HF --gpus eight --gpu-memory 80 --seq-length 8192",
        "megatron-qad export --checkpoint RUN --output OUT --layuot modelopt",
        "megatron-qad evaluate --model RUN --output OUT --qad-techer CKPT",
        "launch/torchrun.sh pretrain_qad.py --config examples/recipes/qwen3_8b/missing.yaml",
        "make dmeo",
        "pip install -e '.[benchmrks]'",
        "hf download Qwen/Qwen3-8B --locl-dir models",
        "unknown-program --flag",
    ],
)
def test_wrong_commands_are_found(line, check, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"```bash\n{line}\n```\n")
    (command,) = commands_of(page)
    with pytest.raises((AssertionError, QADError)):
        check(command)


def test_examples_with_modules_of_the_same_name(check, tmp_path):
    """A page may run several examples whose modules have the same name, such as make_inputs."""
    page, path = tmp_path / "page.md", list(sys.path)
    lines = ["tiny_hybrid/make_inputs.py OUT", "paper_tables/run.py rl --output OUT", "tiny_hybrid/make_inputs.py OUT"]
    page.write_text("".join(f"    python examples/{line}\n" for line in lines))
    for command in commands_of(page):
        check(command)
    assert sys.path == path and not {"make_inputs", "experiments", "random_hybrid"} & sys.modules.keys()


def test_commands_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Text with `make demo` and `make`.\n\n    python tools/plan.py --gpus 8 \\\n      --packed  # comment\n"
        "    not a command\n\n```bash\nA=1\nB=\"--x $A\"\nX=2 megatron-qad plan $B --y 'a b' > file\n```\n"
    )
    assert [command.words for command in commands_of(page)] == [
        ("python", "tools/plan.py", "--gpus", "8", "--packed"),
        ("megatron-qad", "plan", "--x", "1", "--y", "a b"),
        ("make", "demo"),
    ]
