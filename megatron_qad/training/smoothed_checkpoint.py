"""Writes the checkpoint of a smoothed model, with a record of how it was smoothed."""

import argparse
import shutil
from pathlib import Path

import torch
from megatron.training import print_rank_0

from megatron_qad.checkpoint import provenance
from megatron_qad.checkpoint.hf_writer import new_directory
from megatron_qad.checkpoint.release import run_on_all_ranks, write_release
from megatron_qad.engine.run_directory import json_records, manifest
from megatron_qad.engine.run_directory.run_files import SMOOTHING_FILE
from megatron_qad.training.job import QADJob
from megatron_qad.training.smoothing_pass import smooth


def write_smoothed(job: QADJob, output: Path, alpha: float, record: dict) -> None:
    """Smooth the job's teacher and write it as a checkpoint, which ``--qad-teacher`` of other jobs accepts.

    Args:
        output: new or empty directory, locked by the caller.
        alpha: strength, above 0 and up to 1 (``training.smoothing_pass.smooth``).
        record: content of the smoothing record; the SHA-256 of the result is added.
    """
    output = run_on_all_ranks(lambda: new_directory(output))
    result = smooth(job, alpha)

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
