"""Import a checkpoint of Megatron-LM or Megatron-Bridge (torch_dist):

python tools/import_megatron.py --checkpoint DIR --hf-config DIR --output CHECKPOINT [--dtype bfloat16]
"""

import argparse
from pathlib import Path

from megatron_qad.engine import entry_point, init_runtime
from megatron_qad.engine.run_directory.run_files import IMPORT_FILE, TRACKER

DTYPES = ("bfloat16", "float32")
SOURCE = "checkpoint directory of Megatron (its newest iteration is imported), or the directory of one iteration"
CONFIG = "Hugging Face directory with config.json and tokenizer of the model, or its config.json"
REUSE = "succeed without importing if --output is a complete import of this checkpoint; otherwise fail"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help=SOURCE)
    parser.add_argument("--hf-config", required=True, help=CONFIG)
    parser.add_argument("--output", required=True, help="checkpoint directory to write; must be new or empty")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the stored weights")
    parser.add_argument("--num-workers", type=int, help="processes that convert tensors; default: one for each core")
    parser.add_argument("--reuse-existing", action="store_true", help=REUSE)
    options = parser.parse_args()
    init_runtime()
    import torch

    from megatron_qad.checkpoint import import_megatron as imports
    from megatron_qad.checkpoint import provenance
    from megatron_qad.engine.distributed import init_process_group

    dtype = getattr(torch, options.dtype)
    if options.reuse_existing and (Path(options.output) / TRACKER).is_file():
        directory, assets = imports.iteration_to_import(options.checkpoint), imports.assets_of(options.hf_config)
        expected = imports.import_provenance(directory, assets, dtype)
        provenance.check_same_provenance(Path(options.output), IMPORT_FILE, expected)
        return print(f"{options.output} already exists and is up to date")
    init_process_group()
    num_tensors = imports.import_megatron(
        options.checkpoint, options.hf_config, options.output, dtype, options.num_workers
    )
    if torch.distributed.get_rank() == 0:
        print(f"wrote {num_tensors} tensors to {options.output}")


if __name__ == "__main__":
    entry_point.run(main)
