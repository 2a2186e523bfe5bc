"""Measures the noise floor of a quantized checkpoint: half the KL between the model and itself with perturbed inputs.

    megatron-qad noise-floor [--num-microbatches 16] --qad-student RUN --qad-teacher CKPT
      --data-path DATA ...        (Megatron's and megatron-qad train's flags, with the run's policy)

Use the flags of the job that saved RUN; its validation split is measured. A KL to the teacher below this
floor is noise. Without --bf16 the model is computed in float32, so that the perturbation is the only noise.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_qad.cli.command_parser import JOB_FLAGS, command_parser
from megatron_qad.engine import init_runtime


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("noise-floor", __doc__, epilog=JOB_FLAGS)
    parser.add_argument("--num-microbatches", type=int, default=16, help="per data-parallel rank (default: 16)")
    parser.add_argument("--noise-seed", type=int, default=1, help="seed of the changes (default: 1)")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    options, job_argv = make_parser().parse_known_args(argv)
    init_runtime(for_compute=True)
    from megatron.training import print_rank_0
    from megatron.training.initialize import initialize_megatron
    from megatron.training.utils import is_rank0

    from megatron_qad.training.noise_floor import NUDGE, measure_noise
    from megatron_qad.training.start import read_command_line, start_job

    evaluation = ["--eval-interval", "1", "--eval-iters", str(options.num_microbatches), "--skip-train"]
    job = start_job(read_command_line([*job_argv, *evaluation], trains=False))
    initialize_megatron()
    result = measure_noise(job, options.num_microbatches, options.noise_seed)
    print_rank_0(
        f"noise floor: {result.floor:.5g} nats per token, half of KL {result.kl:.5g} to itself with inputs perturbed "
        f"by a relative {NUDGE:.3g}, over {result.num_tokens} tokens"
    )
    if options.output is not None and is_rank0():
        record = {"floor": result.floor, "kl": result.kl, "num_tokens": result.num_tokens, "nudge": NUDGE}
        options.output.write_text(json.dumps(record, indent=1) + "\n")
