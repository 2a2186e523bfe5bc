"""Smooths activation outliers by moving powers of two from activations into weights. Both then quantize better.

    megatron-qad smooth --output SMOOTHED [--alpha 0.5]
      --qad-teacher CKPT --data-path DATA ...        (Megatron's and megatron-qad train's flags)

The function of the model does not change, bit for bit. Pass SMOOTHED as --qad-teacher to a PTQ or QAD job. Activations
are measured on --qad-calibration-samples sequences of the training split.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_qad.cli.command_parser import JOB_FLAGS, command_parser
from megatron_qad.engine import init_runtime
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory.iterations import iteration_to_read
from megatron_qad.engine.run_directory.run_files import SMOOTHING_FILE, TRACKER

REUSE = "succeed without work if --output is complete and was made from the same inputs; fail if from other inputs"
ALPHA = (
    "smoothing strength, above 0 and up to 1: share of a channel's range (log scale) moved into weights (default: 0.5)"
)


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("smooth", __doc__, epilog=JOB_FLAGS)
    parser.add_argument("--output", type=Path, required=True, help="checkpoint directory to write; new or empty")
    parser.add_argument("--alpha", type=float, default=0.5, help=ALPHA)
    parser.add_argument("--reuse-existing", action="store_true", help=REUSE)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    tool_args, job_argv = make_parser().parse_known_args(argv)
    init_runtime(for_compute=True)
    from megatron.training import print_rank_0
    from megatron.training.initialize import initialize_megatron

    from megatron_qad.checkpoint import provenance
    from megatron_qad.checkpoint.release import lock_output
    from megatron_qad.quantization.smoothing import has_smoothed_input
    from megatron_qad.training.smoothed_checkpoint import calibration_text, write_smoothed
    from megatron_qad.training.start import read_command_line, start_job

    if not 0 < tool_args.alpha <= 1:
        raise QADError(f"--alpha {tool_args.alpha}: expected a number above 0 and up to 1.")
    # Smoothing needs norms as separate modules, which the local layer spec has.
    config = read_command_line([*job_argv, "--eval-iters", "0", "--qad-layer-spec", "local"], trains=False)
    options, formats = config.options, config.formats
    if options.qad_teacher is None or options.qad_student is not None:
        raise QADError(
            "smoothing takes one model, given by --qad-teacher, and no --qad-student. Leave --qad-student out."
        )
    if not any(map(has_smoothed_input, formats.values())):
        raise QADError(
            f"--qad-policy {options.qad_policy} quantizes no activation to NVFP4, so there is nothing to smooth. "
            "Choose another policy."
        )
    job = start_job(config)
    settings = {"alpha": tool_args.alpha, "sequences": options.qad_calibration_samples}
    settings |= {"text": calibration_text(job.args)}
    record = provenance.smoothing_provenance(iteration_to_read(options.qad_teacher), settings, formats)
    if tool_args.reuse_existing and (tool_args.output / TRACKER).is_file():
        provenance.check_same_provenance(tool_args.output, SMOOTHING_FILE, record)
        return print_rank_0(f"{tool_args.output} already exists and is up to date")
    initialize_megatron()
    with lock_output(tool_args.output):
        write_smoothed(job, tool_args.output, tool_args.alpha, record)
