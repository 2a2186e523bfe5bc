"""Export to Hugging Face: ``megatron-qad export --checkpoint DIR --output DIR --layout modelopt``.

torchrun's ranks share the shards. After a kill, the same command continues after the finished shards.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_qad.cli.command_parser import command_parser
from megatron_qad.engine import init_runtime
from megatron_qad.engine.run_directory.run_files import EXPORT_FILE

REUSE = "succeed without exporting if --output is a complete export of this iteration in this layout; otherwise fail"


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("export", __doc__)
    parser.add_argument("--checkpoint", required=True, help="checkpoint directory of pretrain_qad.py")
    parser.add_argument("--output", required=True, help="Hugging Face directory to write; must be new or empty")
    parser.add_argument(
        "--layout",
        choices=("modelopt", "compressed-tensors", "bf16"),
        default="modelopt",
        help="modelopt: vLLM, SGLang, TensorRT-LLM. compressed-tensors: vLLM, transformers. bf16: unpacked",
    )
    parser.add_argument(
        "--iteration", help="iteration to export: a number, 'best' by validation KL, or 'selected'; default: the newest"
    )
    parser.add_argument(
        "--max-shard-gb", type=float, default=2.0, help="maximum size of a safetensors file, in 10^9 bytes"
    )
    parser.add_argument("--num-workers", type=int, help="processes that convert tensors; default: one for each core")
    parser.add_argument("--reuse-existing", action="store_true", help=REUSE)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.iteration not in (None, "best", "selected") and not options.iteration.isdigit():
        parser.error(f"--iteration {options.iteration!r}: expected a number, 'best' or 'selected'")
    init_runtime()

    from megatron_qad.checkpoint import provenance
    from megatron_qad.checkpoint.export_hf import export_hf, export_provenance
    from megatron_qad.engine.distributed import init_process_group

    if options.reuse_existing and (Path(options.output) / "config.json").is_file():
        expected = export_provenance(options.checkpoint, options.layout, options.iteration)
        provenance.check_same_provenance(Path(options.output), EXPORT_FILE, expected)
        return print(f"{options.output} already exists and is up to date")
    init_process_group()
    shard_bytes = int(options.max_shard_gb * 1e9)
    written = export_hf(
        options.checkpoint, options.output, options.layout, shard_bytes, options.iteration, options.num_workers
    )
    counts = Counter(written.quantized.values())
    print(
        f"wrote {written.num_tensors} tensors, {written.num_bytes / 1e6:.1f} MB, in {len(written.shards)} file(s) to "
        f"{written.directory}: {', '.join(f'{n} linears {fmt}' for fmt, n in counts.items())}"
        f"{f', {len(written.excluded)} left in {written.dtype}' if counts else 'no linear quantized'}"
    )
    if written.transformers_problem:
        print(
            f"WARNING: this export is for vLLM: {written.transformers_problem}. config.json makes it refuse the export."
        )
