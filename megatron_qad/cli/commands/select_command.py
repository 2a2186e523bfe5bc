"""Evaluates the kept best checkpoints of a run, chooses the best average, and records why.

    megatron-qad select --run RUN --teacher CKPT --output DIR --valid-data-path DATA_valid ...
    megatron-qad select --run RUN --output DIR
      --command 'megatron-qad benchmark --model {export} --output {results} --tasks aime25.yaml --runs 16'
    megatron-qad export --checkpoint RUN --iteration selected --output OUT

Without --command, megatron-qad evaluate measures the KL with the remaining flags, which are those of the job. In a
command, {iteration}, {export}, an export that is made first, and {results} stand for those of a candidate. The same
command again continues after the finished candidates. --only K, or a SLURM array, evaluates one of them
(docs/selection.md).
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_qad.cli.command_parser import command_parser
from megatron_qad.cli.launcher import command_line, environment
from megatron_qad.engine import init_runtime
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.processes import end_with_parent
from megatron_qad.engine.run_directory import locks, new_files
from megatron_qad.engine.system_errors import naming


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("select", __doc__)
    parser.add_argument("--run", type=Path, required=True, help="directory of the run")
    parser.add_argument("--output", type=Path, required=True, help="directory for the evaluations and the choice")
    parser.add_argument("--teacher", help="the teacher's checkpoint, as --qad-teacher of the job")
    parser.add_argument("--command", help="command that evaluates a candidate")
    parser.add_argument("--layout", default="modelopt", help="layout of {export}")
    parser.add_argument("--only", type=int, metavar="K", help="evaluate candidate K, from 0, and do not choose")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    options, flags = make_parser().parse_known_args(argv)
    if options.command is not None and (flags or options.teacher):
        raise QADError(
            f"--command cannot be combined with {' '.join(flags) or '--teacher'}. Put these flags into the command."
        )
    if options.command is not None and "{results}" not in options.command:
        raise QADError("--command must contain {results}, which stands for the directory of its output.")
    init_runtime()

    from megatron_qad.evaluation.selection import find_candidates, markdown, select, write_selection

    if options.teacher:
        flags = ["--qad-teacher", options.teacher, *flags]
    evaluation = {"command": options.command, "layout": options.layout, "flags": flags}
    candidates = find_candidates(options.run, options.output, evaluation)
    only = options.only
    if only is None and os.environ.get("SLURM_ARRAY_TASK_ID", "").isdigit():
        only = int(os.environ["SLURM_ARRAY_TASK_ID"])
    if only is not None and not 0 <= only < len(candidates):
        return print(f"nothing to do: there are {len(candidates)} candidates, numbered from 0, and no {only}")
    for candidate in candidates if only is None else [candidates[only]]:
        with locks.lock_output(candidate.directory):
            if candidate.is_done:
                print(f"iteration {candidate.iteration}: was evaluated before", flush=True)
                continue
            print(f"iteration {candidate.iteration}: evaluating", flush=True)
            _evaluate(candidate, options, flags)
            candidate.finish()
    if only is None:
        selection = select(candidates)
        with naming(options.output):
            write_selection(options.run, options.output, selection)
        sys.stdout.write(markdown(selection))


def _evaluate(candidate, options: argparse.Namespace, flags: list[str]) -> None:
    with naming(candidate.directory):
        candidate.directory.mkdir(exist_ok=True)
    places = {"iteration": str(candidate.iteration), "results": str(candidate.results)}
    iteration = ["--iteration", places["iteration"]]
    if options.command is None:
        new_files.remove(candidate.results)  # of an evaluation that was killed
        command = [*command_line("evaluate"), "--model", str(options.run), *iteration]
        return _run([*command, "--output", places["results"], *flags])
    if "{export}" in options.command:
        places["export"] = str(candidate.directory / "export")
        command = [*command_line("export"), "--checkpoint", str(options.run), *iteration]
        _run([*command, "--output", places["export"], "--layout", options.layout, "--reuse-existing"])
    command = shlex.split(options.command)
    for name, value in places.items():
        command = [word.replace(f"{{{name}}}", value) for word in command]
    _run(command)


def _run(command: list[str]) -> None:
    """Run a command that is killed if this process dies. It does not get SLURM_ARRAY_TASK_ID."""
    variables = environment()
    variables.pop("SLURM_ARRAY_TASK_ID", None)
    try:
        parent = os.getpid()
        status = subprocess.run(command, env=variables, preexec_fn=lambda: end_with_parent(parent)).returncode
    except OSError as error:
        raise QADError(f"{command[0]}: cannot be started ({error.strerror}). Check the command.") from error
    if status:
        raise QADError(
            f"{shlex.join(command)}: ended with status {status}; its output is above. Start again after it is fixed."
        )
