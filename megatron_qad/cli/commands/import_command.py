"""Imports a model as a checkpoint for training (Megatron's torch_dist format).

    megatron-qad import --hf-model HF --output CKPT                     a Hugging Face model
    megatron-qad import --checkpoint DIR --hf-config HF --output CKPT   torch_dist of Megatron-LM, Megatron-Bridge

torchrun's ranks share the tensors. After a kill, the same command continues after the finished files.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_qad.cli.command_parser import command_parser
from megatron_qad.engine import init_runtime
from megatron_qad.engine.run_directory.run_files import IMPORT_FILE, TRACKER

SOURCE = "checkpoint directory of Megatron (its newest iteration is imported), or the directory of one iteration"
CONFIG = "with --checkpoint: Hugging Face directory with config.json and tokenizer of the model, or its config.json"
REUSE = "succeed without importing if --output is a complete import of this model; otherwise fail"


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("import", __doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--hf-model", help="Hugging Face model directory (config.json, *.safetensors)")
    source.add_argument("--checkpoint", help=SOURCE)
    parser.add_argument("--hf-config", help=CONFIG)
    parser.add_argument("--output", required=True, help="checkpoint directory to write; must be new or empty")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of the stored weights"
    )
    parser.add_argument("--num-workers", type=int, help="processes that convert tensors; default: one for each core")
    parser.add_argument("--reuse-existing", action="store_true", help=REUSE)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(argv)
    if (options.checkpoint is None) != (options.hf_config is None):
        parser.error("--checkpoint and --hf-config belong together: the second has the model's config and tokenizer")
    init_runtime()
    import torch

    from megatron_qad.checkpoint import import_megatron, provenance
    from megatron_qad.checkpoint.import_hf import import_hf
    from megatron_qad.engine.distributed import init_process_group

    dtype = getattr(torch, options.dtype)
    if options.reuse_existing and (Path(options.output) / TRACKER).is_file():
        if options.checkpoint is None:
            expected = provenance.model_provenance(Path(options.hf_model), options.dtype)
        else:
            directory = import_megatron.iteration_to_import(options.checkpoint)
            expected = import_megatron.import_provenance(directory, import_megatron.assets_of(options.hf_config), dtype)
        provenance.check_same_provenance(Path(options.output), IMPORT_FILE, expected)
        return print(f"{options.output} already exists and is up to date")
    init_process_group()
    if options.checkpoint is None:
        num_tensors = import_hf(options.hf_model, options.output, dtype, options.num_workers)
    else:
        num_tensors = import_megatron.import_megatron(
            options.checkpoint, options.hf_config, options.output, dtype, options.num_workers
        )
    if torch.distributed.get_rank() == 0:
        print(f"wrote {num_tensors} tensors to {options.output}")
