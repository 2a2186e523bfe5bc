"""From a Hugging Face model and chats to a checkpoint for vLLM, in one command.

    megatron-qad run --model HF --chats chats.jsonl --output WORK [--gpus 8] [--policy P] [FLAGS of megatron-qad train]

Stages: prepare, import, plan, ptq, qad, select, export, validate, report. The same command again continues where it
ended; finished stages are skipped. Flags of the job that are not given are chosen from the data and the machine, and
written to WORK/settings.yaml. If PTQ alone is within --min-kl of the teacher, it is exported without training.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_qad.cli.command_parser import JOB_FLAGS, command_parser
from megatron_qad.cli.early_checks import check_job_flags, flag_values
from megatron_qad.cli.run_settings import Machine, choose_settings, find_machine
from megatron_qad.cli.stages import Stages
from megatron_qad.config.qad_options import QADOptions
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import locks
from megatron_qad.engine.run_directory.run_files import METRICS_FILE, TRACKER
from megatron_qad.engine.text_files import read_json, read_yaml
from megatron_qad.quantization.policy_file import find_policy

MIN_KL = 0.001
"""Nats per token. The rounding noise of small models that we measured is 0.002 and more (docs/decisions): a smaller KL
leaves nothing that training could remove."""


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("run", __doc__, epilog=JOB_FLAGS)
    parser.add_argument("--model", type=Path, required=True, metavar="HF", help="Hugging Face directory in BF16")
    parser.add_argument(
        "--chats", type=Path, nargs="+", required=True, metavar="FILE", help="chats or text (megatron-qad prepare)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="WORK", help="directory for everything")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs, or processes on a CPU (default: all GPUs, or 1)")
    parser.add_argument("--policy", metavar="P", help="as --qad-policy: shipped policy or YAML file")
    parser.add_argument(
        "--layout", choices=("modelopt", "compressed-tensors"), default="modelopt", help="layout of the export"
    )
    parser.add_argument(
        "--validation-fraction", type=float, default=0.01, metavar="F", help="held-out share (default: 0.01)"
    )
    parser.add_argument(
        "--min-kl",
        type=float,
        default=MIN_KL,
        metavar="X",
        help=f"KL of PTQ below which nothing is trained (default: {MIN_KL}; 0: always train)",
    )
    parser.add_argument("--select-command", metavar="CMD", help="as --command of megatron-qad select (default: KL)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options, job_flags = parser.parse_known_args(argv)
    _check(parser, options, job_flags)
    locks.lock_directory(options.output, "--output")
    machine = find_machine(options.gpus)
    Run(options, job_flags, machine).run_all()


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace, job_flags: list[str]) -> None:
    """Check the paths and flags, before torch is imported and minutes are spent."""
    if options.gpus is not None and options.gpus < 1:
        parser.error(f"--gpus {options.gpus}: expected a number above 0")
    if not 0 < options.validation_fraction < 1:
        parser.error(f"--validation-fraction {options.validation_fraction}: expected a number between 0 and 1")
    if not (options.model / "config.json").is_file():
        raise QADError(f"--model {options.model}: no config.json. Expected the directory of a Hugging Face model.")
    for file in options.chats:
        if not file.exists():
            raise QADError(f"--chats {file}: no such file. Check the path.")
    names = {name for name, _ in flag_values(job_flags)}
    if taken := names & {"--qad-teacher", "--save", "--load", "--train-data-path", "--valid-data-path", "--qad-policy"}:
        flag = sorted(taken)[0]
        use = "--policy" if flag == "--qad-policy" else "--model, --chats and --output"
        raise QADError(f"{flag}: is set by megatron-qad run. Use {use}, or the single commands.")
    check_job_flags("run", job_flags)
    if options.policy is not None:
        find_policy(options.policy)


class Run:
    """One run: its directories, and its stages in order."""

    def __init__(self, options: argparse.Namespace, job_flags: list[str], machine: Machine):
        self.options, self.job_flags, self.machine = options, job_flags, machine
        self.work: Path = options.output
        self.stages = Stages(self.work / "log", machine.num_ranks)
        self.data = str(self.work / "data" / "text")
        self.settings = self.work / "settings.yaml"
        self.policy = [] if options.policy is None else ["--qad-policy", options.policy]

    def run_all(self) -> None:
        work, options, stages = self.work, self.options, self.stages
        stages.run("prepare", self._prepare_flags())
        model = ["--hf-model", options.model, "--output", work / "teacher", "--reuse-existing"]
        stages.run("import", model)
        if not (work / "ptq").exists():  # from then on the settings are those of the jobs that have begun
            self._write_settings()
        stages.say(f"settings: {self.settings}")
        stages.run("plan", [*self.job("qad"), "--qad-dry-run"], on_all_gpus=False)
        stages.run("ptq", self.job("ptq"))
        trained = "ptq"
        if self._has_deficit():
            stages.run("qad", self.job("qad"), until=self._has_finished)
            stages.run("select", self._select_flags())
            trained = "qad"
        exported = work / f"hf-{options.layout}"
        iteration = ["--iteration", "selected"] if trained == "qad" else []
        export = ["--checkpoint", work / trained, *iteration, "--output", exported, "--layout", options.layout]
        stages.run("export", [*export, "--reuse-existing"])
        stages.run("validate", [exported, "--against", options.model])
        runs = [f"PTQ={work / 'ptq'}"] + ([f"QAD={work / 'qad'}"] if trained == "qad" else [])
        named = [word for run in runs for word in ("--run", run)]
        report = ["--title", options.model.resolve().name, "--teacher", work / "teacher", *named]
        stages.run("report", [*report, "--export", exported, "--output", work / "report"])
        stages.say(f"report: {work / 'report' / 'report.html'}")
        stages.say("serve it with:")
        print(f"vllm serve {exported}")

    def job(self, name: str) -> list[str | Path]:
        """Return the flags of a job: the chosen settings, then the user's, which win."""
        data = ["--train-data-path", self.data, "--valid-data-path", f"{self.data}_valid"]
        save = ["--save", self.work / name, "--tensorboard-dir", self.work / name / "tensorboard"]
        chosen = ["--config", self.settings, "--qad-teacher", self.work / "teacher", *data, *save, *self.policy]
        return [*chosen, *self.job_flags]

    def _prepare_flags(self) -> list[str | Path]:
        flags = ["--input", *self.options.chats, "--tokenizer", self.options.model, "--output", self.data]
        if "vision_config" in read_json(self.options.model / "config.json"):
            flags += ["--images-for", self.options.model]  # chats may have images
        return [*flags, "--validation-fraction", str(self.options.validation_fraction), "--force"]

    def _write_settings(self) -> None:
        given = given_flags(self.job_flags)
        policy = self.options.policy or str(given.get("qad-policy", QADOptions.qad_policy))
        settings = choose_settings(self.options.model, policy, self.data, self.machine, given)
        lines = ["# Chosen by megatron-qad run; its command line wins. Each key is a flag of megatron-qad train."]
        lines += [f"{name}: {json.dumps(value)}" for name, value in settings.items()]
        self.settings.write_text("\n".join(lines) + "\n")

    def _has_finished(self) -> bool:
        """Whether the training has reached its last step. A job that was stopped also ends with status 0."""
        tracker = self.work / "qad" / TRACKER
        return tracker.is_file() and tracker.read_text().strip() == str(given_flags(self.job("qad"))["train-iters"])

    def _has_deficit(self) -> bool:
        """Print how far PTQ is from the teacher, and return whether it is worth training."""
        values = last_validation(self.work / "ptq" / METRICS_FILE)
        kl = values["validation/kl_to_teacher"]
        self.stages.say(
            f"PTQ: KL {kl:.4g} nats per token, top-1 agreement {values['validation/top1_agreement']:.2%}, "
            f"cross entropy {values['validation/cross_entropy']:.4g} (teacher "
            f"{values['validation/teacher_cross_entropy']:.4g})"
        )
        if kl >= self.options.min_kl:
            return True
        self.stages.say(
            f"PTQ is within --min-kl {self.options.min_kl:g} of the teacher: nothing is trained. Compare benchmarks "
            "(docs/benchmarking.md) before you rely on it; --min-kl 0 trains."
        )
        return False

    def _select_flags(self) -> list[str | Path]:
        flags = ["--run", self.work / "qad", "--output", self.work / "selection"]
        if self.options.select_command is not None:
            return [*flags, "--command", self.options.select_command]
        skipped = ("--save", "--tensorboard-dir")
        job = [
            word
            for flag, words in flag_values(map(str, self.job("qad")))
            if flag not in skipped
            for word in (flag, *words)
        ]
        return [*flags, *job]


def given_flags(flags: Sequence[str | Path]) -> dict[str, object]:
    """Return the flags of a job, without ``--``, and their values, those of ``--config`` files among them."""
    files, others = {}, {}
    for flag, values in flag_values(map(str, flags)):
        if flag == "--config" and values:
            content = read_yaml(Path(values[-1]), f"--config {values[-1]}")
            if not isinstance(content, dict):
                raise QADError(f"--config {values[-1]}: expected a mapping of option names to values.")
            files |= {str(key).replace("_", "-"): value for key, value in content.items()}
        else:
            others[flag.removeprefix("--")] = values[-1] if values else True
    return files | others


def last_validation(metrics: Path) -> dict[str, float]:
    """Return the last row of a run's metrics file that has a validation.

    Raises:
        QADError: there is none.
    """
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    for row in reversed(rows):
        if "validation/kl_to_teacher" in row:
            return row
    raise QADError(f"{metrics}: has no validation. Give a longer --chats, so that some documents are held out.")
