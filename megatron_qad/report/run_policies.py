"""Formats and sizes of the linears of each run, for the policy map of a run report."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_qad.engine.run_directory.run_files import JOB_FILE
from megatron_qad.formats.format_registry import UNQUANTIZED
from megatron_qad.models.checkpoint_config import read_config
from megatron_qad.models.families import family_of
from megatron_qad.quantization.format_table import BF16_BYTES, Row, format_rows
from megatron_qad.quantization.scale_record import recorded_scales
from megatron_qad.report.linear_grid import LinearGrid, linear_grid
from megatron_qad.report.runs import Run


@dataclass(frozen=True)
class RunPolicy:
    """The formats that one or more runs gave to the linears of a model."""

    runs: tuple[str, ...]
    name: str
    """Name or file of the policy."""
    kv_cache: str
    rows: dict[str, Row]
    """Format and sizes of every linear by Megatron weight name, in model order."""
    grid: LinearGrid
    other_bytes: int
    """Size in BF16 of all tensors that are not linears, such as embeddings and norms."""

    @property
    def bytes_before(self) -> int:
        return self.other_bytes + sum(row.bytes_before for row in self.rows.values())

    @property
    def bytes_after(self) -> int:
        return self.other_bytes + sum(row.bytes_after for row in self.rows.values())


def run_policies(runs: Sequence[Run]) -> list[RunPolicy]:
    """Return the policies of the runs that have a qad.json. Runs with equal formats, sizes and scales share one."""
    policies: list[RunPolicy] = []
    for run in runs:
        if run.job is None:
            continue
        policy = _of_run(run)
        for i, other in enumerate(policies):
            if (other.rows, other.kv_cache) == (policy.rows, policy.kv_cache):
                policies[i] = dataclasses.replace(other, runs=(*other.runs, run.name))
                break
        else:
            policies.append(policy)
    return policies


def _of_run(run: Run) -> RunPolicy:
    config = read_config(run.directory)
    family = family_of(config)
    linears = [linear for linear in family.linears(config) if linear.megatron in run.job["formats"]]
    scales = recorded_scales(run.job, f"{run.directory}/{JOB_FILE}")
    rows = format_rows(linears, run.job["formats"], scales)
    num_weights = sum(math.prod(tensor.shape) for tensor in family.all_tensors(config))
    return RunPolicy(
        (run.name,),
        str(run.job.get("policy")),
        run.job.get("kv_cache", UNQUANTIZED.name),
        dict(zip((linear.megatron for linear in linears), rows, strict=True)),
        linear_grid(linears),
        BF16_BYTES * num_weights - sum(row.bytes_before for row in rows),
    )
