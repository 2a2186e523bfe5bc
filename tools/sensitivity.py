"""Sensitivity of each layer to quantization, and a policy under a byte budget.

    torchrun --nproc-per-node N tools/sensitivity.py --output DIR [--formats nvfp4 fp8] [--budget-mb 80] \
      --qad-teacher CKPT --data-path DATA ...        (Megatron's and pretrain_qad.py's flags)

The model is --qad-teacher's, the text the validation split's; --qad-policy says which linears are candidates at all.
"""

import argparse
import sys
from pathlib import Path

from megatron_qad.engine import QADError, init_runtime
from megatron_qad.engine.run_directory import atomic_checkpoint, locks

init_runtime(for_compute=True)

import yaml  # noqa: E402
from megatron.training import print_rank_0  # noqa: E402
from megatron.training.initialize import initialize_megatron  # noqa: E402
from megatron.training.utils import is_rank0  # noqa: E402

from megatron_qad.report.sensitivity_report import write_sensitivity  # noqa: E402
from megatron_qad.training.sensitivity import Probe, measure, policy_document, propose, units_of  # noqa: E402
from megatron_qad.training.start import read_command_line, start_job  # noqa: E402

FORMATS = ("nvfp4", "nvfp4-w4a16", "fp8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, add_help=False)
    parser.add_argument("--output", type=Path, required=True, help="directory for the table, the plot and policy.yaml")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["nvfp4"], help="formats to measure")
    parser.add_argument("--budget-mb", type=float, help="10^6 bytes that the candidates may take; no proposal without")
    parser.add_argument("--num-microbatches", type=int, default=4, help="of held-out text, a data-parallel rank")
    own, rest = parser.parse_known_args(argv)
    evaluation = ["--eval-interval", "1", "--eval-iters", str(own.num_microbatches)]
    config = read_command_line([*rest, *evaluation], trains=False)
    job = start_job(config)
    initialize_megatron()
    atomic_checkpoint.on_first_rank(lambda: locks.lock_directory(own.output, "--output"))
    linears = config.student.family.linears(config.student.hf)
    units = units_of(linears, config.formats)
    if not units:
        raise QADError(f"--qad-policy {config.options.qad_policy} quantizes nothing, so there is nothing to measure")
    probe = Probe(job, [x.megatron for unit in units for x in unit.linears], own.num_microbatches)
    found = measure(probe, units, own.formats, show_progress=is_rank0())
    chosen = proposal_kl = budget = None
    if own.budget_mb is not None:
        budget = int(own.budget_mb * 1e6)
        chosen = propose(found, own.formats, budget)
        proposal_kl, _ = probe.kl({x.megatron: chosen[u.name] for u in units for x in u.linears})
    if is_rank0():
        title = f"Sensitivity of {config.student.family.architecture}, {len(units)} layers"
        numbers = {"chosen": chosen, "proposal_kl": proposal_kl, "budget_bytes": budget}
        write_sensitivity(found, own.formats, own.output, title=title, **numbers)
        if chosen is not None:
            document = policy_document(units, chosen, linears)
            (own.output / "policy.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    for fmt in own.formats:
        print_rank_0(f"everything in {fmt}: KL {found.everything[fmt]:.5g} over {found.num_tokens} tokens")
    if chosen is not None:
        print_rank_0(f"proposal: KL {proposal_kl:.5g}")
    print_rank_0(f"wrote sensitivity.md, .png and .json{', policy.yaml' if chosen else ''} to {own.output}")


if __name__ == "__main__":
    try:
        main()
    except QADError as error:
        sys.exit(f"error: {error}")
