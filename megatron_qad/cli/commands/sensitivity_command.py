"""Measures the sensitivity of each layer to quantization, and proposes a policy for a byte budget.

    megatron-qad sensitivity --output DIR [--formats nvfp4 fp8] [--budget-mb 80]
      --qad-teacher CKPT --data-path DATA ...        (Megatron's and megatron-qad train's flags)

Measures the model of --qad-teacher on the validation split. Candidates are the linears that --qad-policy quantizes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_qad.cli.command_parser import JOB_FLAGS, command_parser
from megatron_qad.engine import init_runtime
from megatron_qad.engine.errors import QADError


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("sensitivity", __doc__, epilog=JOB_FLAGS)
    parser.add_argument(
        "--output", type=Path, required=True, help="output directory for the table, the plot and policy.yaml"
    )
    parser.add_argument("--formats", nargs="+", metavar="FORMAT", help="formats to measure (default: NVFP4, W4A4)")
    parser.add_argument(
        "--budget-mb", type=float, help="size limit of all candidates in 10^6 bytes (default: no proposal is made)"
    )
    parser.add_argument(
        "--num-microbatches", type=int, default=4, help="held-out microbatches per data-parallel rank (default: 4)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    options, job_argv = make_parser().parse_known_args(argv)
    init_runtime(for_compute=True)
    import yaml
    from megatron.training import print_rank_0
    from megatron.training.initialize import initialize_megatron
    from megatron.training.utils import is_rank0

    from megatron_qad.engine.run_directory import atomic_checkpoint, locks
    from megatron_qad.formats.format_registry import DEFAULT_FORMAT, FORMATS
    from megatron_qad.report.sensitivity_report import write_sensitivity
    from megatron_qad.training.sensitivity import Probe, group_into_units, measure, policy_document, propose
    from megatron_qad.training.start import read_command_line, start_job

    formats = options.formats or [DEFAULT_FORMAT]
    known = [name for name, fmt in FORMATS.items() if fmt.quantizes]
    if unknown := [name for name in formats if name not in known]:
        raise QADError(f"--formats {unknown[0]}: no such format. Choose from {', '.join(known)}.")
    evaluation = ["--eval-interval", "1", "--eval-iters", str(options.num_microbatches), "--skip-train"]
    config = read_command_line([*job_argv, *evaluation], trains=False)
    job = start_job(config)
    initialize_megatron()
    atomic_checkpoint.on_first_rank(lambda: locks.lock_directory(options.output, "--output"))
    linears = config.student.family.linears(config.student.hf)
    units = group_into_units(linears, config.formats)
    if not units:
        raise QADError(
            f"--qad-policy {config.options.qad_policy} quantizes nothing, so there is nothing to measure. Choose a "
            "policy that quantizes some linears."
        )
    probe = Probe(job, [x.megatron for unit in units for x in unit.linears], options.num_microbatches)
    measured = measure(probe, units, formats, show_progress=is_rank0())
    chosen = proposal_kl = budget = None
    if options.budget_mb is not None:
        budget = int(options.budget_mb * 1e6)
        chosen = propose(measured, formats, budget)
        proposal_kl, _ = probe.kl({x.megatron: chosen[u.name] for u in units for x in u.linears})
    if is_rank0():
        title = f"Sensitivity of {config.student.family.architecture}, {len(units)} layers"
        numbers = {"chosen": chosen, "proposal_kl": proposal_kl, "budget_bytes": budget}
        write_sensitivity(measured, formats, options.output, title=title, **numbers)
        if chosen is not None:
            document = policy_document(units, chosen, linears)
            (options.output / "policy.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    for fmt in formats:
        print_rank_0(f"all layers in {fmt}: KL {measured.everything[fmt]:.5g} over {measured.num_tokens} tokens")
    if chosen is not None:
        print_rank_0(f"proposal: KL {proposal_kl:.5g}")
    print_rank_0(f"wrote sensitivity.md, .png and .json{', policy.yaml' if chosen else ''} to {options.output}")
