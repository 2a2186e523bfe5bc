"""Import a Hugging Face model: ``python tools/import_hf.py --hf-model DIR --output CHECKPOINT [--dtype bfloat16]``.

torchrun's ranks share the tensors. After a kill, the same command continues after the finished files.
"""

import argparse
from pathlib import Path

from megatron_qad.engine import entry_point, init_runtime
from megatron_qad.engine.run_directory.run_files import IMPORT_FILE, TRACKER

DTYPES = ("bfloat16", "float32")
REUSE = "succeed without importing if --output is a complete import of this model; otherwise fail"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-model", required=True, help="Hugging Face model directory (config.json, *.safetensors)")
    parser.add_argument("--output", required=True, help="checkpoint directory to write; must be new or empty")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the stored weights")
    parser.add_argument("--num-workers", type=int, help="processes that convert tensors; default: one for each core")
    parser.add_argument("--reuse-existing", action="store_true", help=REUSE)
    options = parser.parse_args()
    init_runtime()
    import torch

    from megatron_qad.checkpoint import provenance
    from megatron_qad.checkpoint.import_hf import import_hf
    from megatron_qad.engine.distributed import init_process_group

    if options.reuse_existing and (Path(options.output) / TRACKER).is_file():
        expected = provenance.model_provenance(Path(options.hf_model), options.dtype)
        provenance.check_same_provenance(Path(options.output), IMPORT_FILE, expected)
        return print(f"{options.output} already exists and is up to date")
    init_process_group()
    num_tensors = import_hf(options.hf_model, options.output, getattr(torch, options.dtype), options.num_workers)
    if torch.distributed.get_rank() == 0:
        print(f"wrote {num_tensors} tensors to {options.output}")


if __name__ == "__main__":
    entry_point.run(main)
