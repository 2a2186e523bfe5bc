"""Moves scales between inputs and weights, so that both round better to NVFP4; the model stays what it is, bit for bit.

    torchrun --nproc-per-node N tools/smooth.py --output SMOOTHED [--alpha 0.5] \
      --qad-teacher CKPT --data-path DATA ...        (Megatron's and pretrain_qad.py's flags)

SMOOTHED is then the --qad-teacher of a job, PTQ or QAD. The text is the training split's, --qad-calibration-samples
sequences of it.
"""

import argparse
import shutil
import sys
from pathlib import Path

from megatron_qad.engine import QADError, init_runtime

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

REUSE = "if --output is complete already and would be made again, leave it and succeed; if of something else, fail"
ALPHA = "share of a channel's range, as an alpha, that goes into the weights: 0 none, 1 all (default: 0.5)"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, add_help=False)
    parser.add_argument("--output", type=Path, required=True, help="checkpoint directory to write; empty or new")
    parser.add_argument("--alpha", type=float, default=0.5, help=ALPHA)
    parser.add_argument("--reuse-existing", action="store_true", help=REUSE)
    own, rest = parser.parse_known_args(argv)
    if not 0 < own.alpha <= 1:
        raise QADError(f"--alpha {own.alpha}: expected a number above 0, up to 1")
    # The norms must be modules of their own.
    config = read_command_line([*rest, "--eval-iters", "0", "--qad-layer-spec", "local"], trains=False)
    options, formats = config.options, config.formats
    if options.qad_teacher is None or options.qad_student is not None:
        raise QADError("--qad-teacher, and no --qad-student: the model that is to be smoothed")
    if not any(map(has_smoothed_input, formats.values())):
        raise QADError(f"--qad-policy {options.qad_policy} quantizes no input to NVFP4, so there is nothing to smooth")
    job = start_job(config)
    asked = {"alpha": own.alpha, "sequences": options.qad_calibration_samples}
    asked |= {"text": calibration_text(job.args)}
    record = provenance.smoothing_provenance(iteration_to_read(options.qad_teacher), asked, formats)
    if own.reuse_existing and (own.output / TRACKER).is_file():
        provenance.check_same_provenance(own.output, SMOOTHING_FILE, record)
        return print_rank_0(f"{own.output} is there already")
    initialize_megatron()
    with lock_output(own.output):
        smooth_and_write(job, own, record)


def smooth_and_write(job: QADJob, own: argparse.Namespace, record: dict) -> None:
    output = run_on_all_ranks(lambda: new_directory(own.output))
    done = smooth(job, own.alpha)

    def finish(aside: Path) -> None:
        source = Path(job.config.options.qad_teacher) / "hf"
        manifest.verify_directory(source, "config.json")
        shutil.copytree(source, aside / "hf")
        described = record | {"result": provenance.iteration_sha256(aside / "release")}
        json_records.write(aside / SMOOTHING_FILE, described)

    write_release(output, done.sharded, finish)
    moved = torch.cat(list(done.factors.values())) if done.factors else torch.ones(1)
    print_rank_0(
        f"megatron_qad: smoothed on {done.num_sequences} sequences; on the first rank {len(done.factors)} inputs, "
        f"{(moved != 1).float().mean():.0%} of their channels, by {moved.min():g} to {moved.max():g}"
    )
    change = f"changed by up to {done.largest_change:.3g} of their root mean square"
    same = "what they were, bit for bit" if done.largest_change == 0 else change
    print_rank_0(f"megatron_qad: final hidden states are {same}; wrote {output}")


def calibration_text(args: argparse.Namespace) -> list:
    """What decides which sequences a model sees, and in which precision."""
    data = [args.data_path, args.train_data_path, args.data_args_path, args.per_split_data_args_path, args.split]
    return [*data, args.seq_length, args.seed, str(args.params_dtype).removeprefix("torch.")]


if __name__ == "__main__":
    try:
        main()
    except QADError as error:
        sys.exit(f"error: {error}")
