"""Sample training text from a model, as JSONL for megatron-qad prepare. The same command resumes a killed run.

megatron-qad generate --model my_model/ --output own.jsonl --num-documents 1000
megatron-qad generate --model my_model/ --prompts prompts.txt --output answers.jsonl
megatron-qad generate --server http://localhost:8000/v1 --prompts problems.jsonl --output answers.jsonl
"""

import argparse
import json
from collections.abc import Sequence

from megatron_qad.cli.command_parser import command_parser
from megatron_qad.data.generate import GenerateOptions, Source, write_documents
from megatron_qad.data.openai_server import SERVER_FIELDS
from megatron_qad.data.prompts import read_prompts
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.plural import count

HELP = {
    "max_new_tokens": "maximum length of a document or an answer, in tokens",
    "batch_size": "documents sampled at a time; requests that run at the same time",
    "temperature": "sampling temperature",
    "top_p": "probability mass to sample from",
    "seed": "random seed",
}


def make_parser() -> argparse.ArgumentParser:
    defaults = GenerateOptions(num_documents=1)
    parser = command_parser("generate", __doc__)
    parser.add_argument("--model", help="Hugging Face directory with model and tokenizer")
    parser.add_argument(
        "--server", metavar="URL", help="OpenAI-compatible API, such as vllm serve; key: OPENAI_API_KEY"
    )
    parser.add_argument("--served-model", metavar="NAME", help="the model's name on the server, if it serves several")
    parser.add_argument(
        "--server-fields", type=json.loads, help="JSON of more request fields (default: top_k, min_p, ... off)"
    )
    parser.add_argument("--output", required=True, help="JSONL file to write; a restarted run resumes it")
    parser.add_argument(
        "--prompts",
        help='text with one user prompt per line, or .jsonl with "prompt" or "messages", whose other fields are kept; '
        "without it the model starts from BOS",
    )
    parser.add_argument(
        "--random-tokens",
        action="store_true",
        help="write documents of --max-new-tokens random tokens of --model's tokenizer",
    )
    parser.add_argument("--num-documents", type=int, help="number of lines to write; default: the number of prompts")
    for name, text in HELP.items():
        default = getattr(defaults, name)
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default, help=f"{text}; default %(default)s")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default=defaults.dtype, help="default %(default)s")
    parser.add_argument("--device", help="torch device; default: cuda, or cpu without a GPU")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    prompts = read_prompts(arguments.prompts) if arguments.prompts else None
    if arguments.num_documents is None:
        if prompts is None:
            raise QADError("--num-documents is needed without --prompts. Give a number.")
        arguments.num_documents = len(prompts)
    sampling = {name: getattr(arguments, name) for name in (*HELP, "num_documents", "dtype")}
    written = write_documents(
        source(arguments, prompts, GenerateOptions(**sampling)), arguments.output, arguments.num_documents
    )
    print(f"{arguments.output}: {count(written, 'document')} written, {arguments.num_documents} in total")


def source(arguments: argparse.Namespace, prompts, options: GenerateOptions) -> Source:
    """Return the source that the flags choose."""
    if arguments.random_tokens and (arguments.server or prompts):
        raise QADError("--random-tokens cannot be combined with --server or --prompts. Remove them.")
    if arguments.server:
        from megatron_qad.data.server_generation import ServerModel
        from megatron_qad.data.tokenizer import load_tokenizer

        bos = None
        if prompts is None and arguments.model:
            tokenizer = load_tokenizer(arguments.model)
            bos = tokenizer.eod if tokenizer.bos is None else tokenizer.bos
        fields = SERVER_FIELDS if arguments.server_fields is None else arguments.server_fields
        return ServerModel(arguments.server, prompts, options, arguments.served_model, bos, fields)
    if not arguments.model:
        raise QADError("no model was given. Pass --model or --server.")
    if arguments.random_tokens:
        from megatron_qad.data.random_tokens import RandomTokens

        return RandomTokens(arguments.model, options)
    import torch

    from megatron_qad.data.local_generation import LocalModel

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return LocalModel(arguments.model, prompts, options, device)
