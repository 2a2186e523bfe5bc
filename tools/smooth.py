"""Smooths activation outliers by moving powers of two from activations into weights. Both then quantize better.

    torchrun --nproc-per-node N tools/smooth.py --output SMOOTHED [--alpha 0.5] \
      --qad-teacher CKPT --data-path DATA ...        (Megatron's and pretrain_qad.py's flags)

The function of the model does not change, bit for bit. Pass SMOOTHED as --qad-teacher to a PTQ or QAD job. Activations
are measured on --qad-calibration-samples sequences of the training split.
"""

import argparse
import shutil
from pathlib import Path

from megatron_qad.engine import QADError, entry_point, init_runtime

init_runtime(for_compute=True)

import torch  # noqa: E402
from megatron.training import print_rank_0  # noqa: E402
from megatron.training.initialize import initialize_megatron  # noqa: E402

from megatron_qad.checkpoint import provenance  # noqa: E402
from megatron_qad.checkpoint.hf_writer import new_directory  # noqa: E402
from megatron_qad.checkpoint.release import lock_output, run_on_all_ranks, write_release  # noqa: E402
from megatron_qad.engine.run_directory import json_records, manifest  # noqa: E402
from megatron_qad.engine.run_directory.iterations import iteration_to_read  # noqa: E402
from megatron_qad.engine.run_directory.run_files import SMOOTHING_FILE, TRACKER  # noqa: E402
from megatron_qad.quantization.smoothing import has_smoothed_input  # noqa: E402
from megatron_qad.training.job import QADJob  # noqa: E402
from megatron_qad.training.smoothing_pass import smooth  # noqa: E402
from megatron_qad.training.start import read_command_line, start_job  # noqa: E402

EPILOG = "All flags of pretrain_qad.py are accepted as well; its --help lists them."
REUSE = "succeed without work if --output is complete and was made from the same inputs; fail if from other inputs"
ALPHA = (
    "smoothing strength, above 0 and up to 1: share of a channel's range (log scale) moved into weights (default: 0.5)"
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, epilog=EPILOG)
    parser.add_argument("--output", type=Path, required=True, help="checkpoint directory to write; new or empty")
    parser.add_argument("--alpha", type=float, default=0.5, help=ALPHA)
    parser.add_argument("--reuse-existing", action="store_true", help=REUSE)
    tool_args, job_argv = parser.parse_known_args(argv)
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
        smooth_and_write(job, tool_args, record)


def smooth_and_write(job: QADJob, tool_args: argparse.Namespace, record: dict) -> None:
    output = run_on_all_ranks(lambda: new_directory(tool_args.output))
    result = smooth(job, tool_args.alpha)

    def finish(aside: Path) -> None:
        source = Path(job.config.options.qad_teacher) / "hf"
        manifest.verify_directory(source, "config.json")
        shutil.copytree(source, aside / "hf")
        complete_record = record | {"result": provenance.iteration_sha256(aside / "release")}
        json_records.write(aside / SMOOTHING_FILE, complete_record)

    write_release(output, result.sharded, finish)
    factors = torch.cat(list(result.factors.values())) if result.factors else torch.ones(1)
    print_rank_0(
        f"megatron_qad: smoothed on {result.num_sequences} sequences; on the first rank {len(result.factors)} inputs, "
        f"{(factors != 1).float().mean():.0%} of their channels, by {factors.min():g} to {factors.max():g}"
    )
    change = f"changed by up to {result.largest_change:.3g} of their root mean square"
    same = "unchanged, bit for bit" if result.largest_change == 0 else change
    print_rank_0(f"megatron_qad: final hidden states are {same}; wrote {output}")


def calibration_text(args: argparse.Namespace) -> list:
    """Return the arguments that determine the calibration sequences and the precision of the model."""
    data = [args.data_path, args.train_data_path, args.data_args_path, args.per_split_data_args_path, args.split]
    return [*data, args.seq_length, args.seed, str(args.params_dtype).removeprefix("torch.")]


if __name__ == "__main__":
    entry_point.run(main)
