"""Sample training text from a model, as JSONL for tools/prepare_data.py.

python tools/generate_data.py --model my_model/ --output data/own.jsonl --num-documents 1000
python tools/generate_data.py --model my_model/ --prompts prompts.txt --output data/answers.jsonl
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_qad.data.generate import GenerateOptions, generate_documents, read_prompts  # noqa: E402
from megatron_qad.engine import QADError, entry_point  # noqa: E402
from megatron_qad.engine.plural import count  # noqa: E402


def main() -> None:
    import torch

    defaults = GenerateOptions(num_documents=1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory with model and tokenizer")
    parser.add_argument("--output", required=True, help="JSONL file to write; a restarted run resumes it")
    parser.add_argument(
        "--prompts", help="text file with one user prompt per line; without it the model starts from BOS"
    )
    parser.add_argument("--num-documents", type=int, help="number of lines to write; default: the number of prompts")
    for name in ("max_new_tokens", "batch_size", "temperature", "top_p", "seed"):
        default = getattr(defaults, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=default, help="default %(default)s"
        )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default=defaults.dtype, help="default %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    arguments = vars(parser.parse_args())
    model, output, prompts_file, device = (arguments.pop(k) for k in ("model", "output", "prompts", "device"))
    prompts = read_prompts(prompts_file) if prompts_file else None
    if arguments["num_documents"] is None:
        if prompts is None:
            raise QADError("--num-documents is needed without --prompts. Give a number.")
        arguments["num_documents"] = len(prompts)
    written = generate_documents(model, prompts, output, GenerateOptions(**arguments), device=device)
    print(f"{output}: {count(written, 'document')} written, {arguments['num_documents']} in total")


if __name__ == "__main__":
    entry_point.run(main)
