"""Evaluates one model against its teacher, token by token, on the validation set of a job.

    megatron-qad evaluate --model DIR --output RECORD [--name QAD] [--iteration best]
      --qad-teacher CKPT --data-path DATA ...        (Megatron's and megatron-qad train's flags of the job)

DIR is a run of pretrain_qad.py, an imported checkpoint (the BF16 model), or an exported directory (modelopt,
compressed-tensors, bf16). Its formats and scales are those that its own files name; the flags that choose the student
of a job (--qad-student, --qad-policy, --qad-loss and others) are ignored. RECORD is read by
megatron-qad compare (docs/evaluate.md).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import megatron_qad
from megatron_qad.cli.command_parser import JOB_FLAGS, command_parser
from megatron_qad.engine import init_runtime
from megatron_qad.engine.errors import QADError


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("evaluate", __doc__, epilog=JOB_FLAGS)
    parser.add_argument("--model", type=Path, required=True, help="run, imported checkpoint or exported directory")
    parser.add_argument("--output", type=Path, required=True, help="directory for the record")
    parser.add_argument("--name", help="name in tables (default: the last part of --model)")
    parser.add_argument("--iteration", help="iteration of a run: a number, 'best' or 'selected' (default: the newest)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options, job_argv = parser.parse_known_args(argv)
    init_runtime(for_compute=True)
    from megatron.training import print_rank_0
    from megatron.training.initialize import initialize_megatron

    from megatron_qad.engine.distributed import on_rank_0
    from megatron_qad.evaluation import record
    from megatron_qad.evaluation.per_token import check_tokens, collect_tokens
    from megatron_qad.evaluation.subject import build_subject, describe_formats, find_subject
    from megatron_qad.training.models import build_teacher
    from megatron_qad.training.start import read_command_line, start_job

    if options.iteration not in (None, "best", "selected") and not options.iteration.isdigit():
        parser.error(f"--iteration {options.iteration!r}: expected a number, 'best' or 'selected'")
    subject = find_subject(options.model, options.iteration)
    config = read_command_line([*job_argv, "--skip-train", "--eval-interval", "1"], trains=False, student=subject.model)
    if config.flags.eval_iters == 0:
        raise QADError("--eval-iters 0: nothing would be evaluated. Omit it to evaluate the whole validation set.")
    job = start_job(config)
    initialize_megatron()
    on_rank_0(lambda: record.check_output(options.output))
    chunks = build_subject(job, subject)
    teacher = build_teacher(job.config, job.args, job.forward)
    tokens, rows = collect_tokens(job, chunks, teacher)

    def write() -> dict:
        check_tokens(tokens)
        about = {
            "name": options.name or options.model.resolve().name,
            "model": str(options.model),
            "iteration": subject.iteration,
            "teacher": config.teacher.checkpoint,
            "formats": describe_formats(job),
            "precision": "bfloat16" if job.args.bf16 else "float16" if job.args.fp16 else "float32",
            "tokens_sha256": job.datasets_provider.validation_sha256,
            "num_tokens": len(tokens["row"]),
            "means": record.means(tokens),
            "version": megatron_qad.__version__,
        }
        record.save(record.Evaluation(about, tokens, rows), options.output)
        return about

    about = on_rank_0(write)
    means = " | ".join(f"{name}: {value:.6g}" for name, value in about["means"].items())
    print_rank_0(f"megatron_qad evaluation of {about['name']} ({about['formats']}) | {means}")
    print_rank_0(f"megatron_qad: {about['num_tokens']} tokens of {len(rows)} rows, in {options.output}")
    if (validated := subject.validated(about["tokens_sha256"])) is not None:
        difference = about["means"]["kl_to_teacher"] / validated - 1 if validated else 0.0
        print_rank_0(
            f"megatron_qad: the run's own validation of this iteration: KL {validated:.6g} ({difference:+.1e})"
        )
