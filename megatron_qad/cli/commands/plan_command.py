"""Propose parallelism for a QAD job: bytes per rank, time of a step, and what does not fit.

    megatron-qad plan --hf-model DIR --gpus 8 --gpu-memory 80 --seq-length 8192

Reads only config.json. Times are estimates from operations and bytes at the rates that the flags state; see
docs/planning.md for what has been measured.
"""

import argparse
from collections.abc import Sequence

from megatron_qad.cli.command_parser import command_parser
from megatron_qad.cli.run_settings import RESERVED
from megatron_qad.engine.chips import BF16_PEAKS


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("plan", __doc__)
    parser.add_argument(
        "--hf-model", required=True, metavar="DIR", help="student: Hugging Face directory or config.json"
    )
    parser.add_argument("--teacher", metavar="DIR", help="teacher, if it is another model than the student")
    parser.add_argument("--policy", default="nvfp4-all-linear", help="name of a shipped policy, or a YAML file")
    parser.add_argument("--rule", nargs="+", action="extend", default=[], help="rules to append to the policy")
    parser.add_argument("--gpus", required=True, type=int, metavar="N", help="number of GPUs")
    parser.add_argument("--gpu-memory", required=True, type=float, metavar="GB", help="memory of a GPU in 1e9 bytes")
    parser.add_argument(
        "--reserve",
        type=float,
        default=RESERVED,
        metavar="SHARE",
        help="share of the memory for what is not counted: temporary tensors, buffers, fragmentation (default: "
        "%(default)s)",
    )
    parser.add_argument("--seq-length", required=True, type=int, metavar="S", help="tokens of a sequence")
    parser.add_argument("--images", action="store_true", help="the data has images: count the vision encoder")
    parser.add_argument("--packed", action="store_true", help="rows hold several documents")
    parser.add_argument(
        "--global-batch-size", type=int, default=64, metavar="B", help="sequences of a step (default: 64)"
    )
    parser.add_argument("--micro-batch-size", type=int, nargs="+", default=[1, 2], help="sizes to try (default: 1 2)")
    parser.add_argument("--tokens", type=float, default=0.5e9, help="tokens of the training (default: 0.5e9)")
    parser.add_argument("--layer-spec", choices=("te", "local"), default="te", help="layers of the GPU (default: te)")
    parser.add_argument("--gpu", choices=BF16_PEAKS, default="H100", help="chip, for its peak (default: H100)")
    parser.add_argument("--mfu", type=float, default=0.35, help="share of the peak that is reached (default: 0.35)")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--node-bandwidth", type=float, default=300, metavar="GB/S", help="default: 300")
    parser.add_argument("--network-bandwidth", type=float, default=40, metavar="GB/S", help="default: 40")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    check(options, parser)

    from megatron_qad.planning import proposal_tables
    from megatron_qad.planning.activations import kernels_of
    from megatron_qad.planning.proposals import Planner, Request
    from megatron_qad.planning.step_time import Machine
    from megatron_qad.planning.time_lines import Chip, describe_machine

    kernels = kernels_of(options.layer_spec, on_gpu=True)
    job = proposal_tables.read_job(
        options.hf_model, options.teacher, options.policy, options.rule, kernels, images=options.images
    )
    chip = Chip(options.gpu)
    machine = Machine(
        peak=chip.peak,
        mfu=options.mfu,
        gpus_per_node=options.gpus_per_node,
        node_bandwidth=options.node_bandwidth * 1e9,
        network_bandwidth=options.network_bandwidth * 1e9,
    )
    request = Request(
        num_gpus=options.gpus,
        memory=options.gpu_memory * 1e9 * (1 - options.reserve),
        seq_length=options.seq_length,
        global_batch_size=options.global_batch_size,
        micro_batch_sizes=tuple(options.micro_batch_size),
        is_packed=options.packed,
    )
    print(f"model       {job.student.family.architecture}, {job.student_params.total:,} parameters")
    print(f"teacher     {job.teacher.family.architecture}, {job.teacher_params.total:,} parameters, frozen")
    print(
        f"job         {options.gpus} GPUs of {options.gpu_memory:g} GB, {options.reserve:.0%} of it reserved; "
        f"{options.global_batch_size} x {options.seq_length} tokens a step, {options.tokens:,.0f} tokens"
    )
    print(f"assumed     {describe_machine(chip, machine)}")
    print(f"activations {kernels.describe()}; the other bytes are sizes of tensors; times are estimates")
    print()
    print("\n".join(proposal_tables.lines(Planner(job, proposal_tables.LOSSES, request, machine), options.tokens)))


def check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """End with argparse's error if a number is not usable."""
    positive = ("gpus", "gpu_memory", "seq_length", "global_batch_size", "tokens", "mfu", "gpus_per_node")
    for name in (*positive, "node_bandwidth", "network_bandwidth"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: expected a number above 0")
    if min(options.micro_batch_size) < 1:
        parser.error(f"--micro-batch-size {min(options.micro_batch_size)}: expected numbers of 1 or more")
    if not 0 <= options.reserve < 1 or options.mfu > 1:
        parser.error("--reserve must be at least 0 and below 1, and --mfu at most 1")
