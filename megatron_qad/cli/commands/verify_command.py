"""Check prepared data completely: its files, their SHA-256 and its ids. A job does the same when it starts, except for
data that takes minutes to read (more than 100 GiB per rank); it then uses what this tool has found.

megatron-qad verify --vocab-size 128256 --data-cache-path CACHE data/chats data/texts
"""

import argparse
from collections.abc import Sequence

from megatron_qad.cli.command_parser import command_parser
from megatron_qad.engine import init_runtime


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("verify", __doc__)
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="prefixes of the data, as for --data-path")
    parser.add_argument("--vocab-size", type=int, help="number of ids of the model; without it, ids are not compared")
    parser.add_argument("--data-cache-path", help="the job's --data-cache-path, if it has one")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    init_runtime()
    from megatron_qad.data.checks import check_content, read_contents
    from megatron_qad.data.prefix_files import file_sizes
    from megatron_qad.data.prepared_files import open_prefix

    found = []
    for prefix in options.prefixes:
        file_sizes(prefix)
        found.append(open_prefix(prefix))
    reading = read_contents(found, options.data_cache_path, max_bytes=None)
    for data in found:
        check_content(data, reading.facts, options.vocab_size)
        largest = reading.facts[f"{data.prefix}.bin"].largest
        sums = "SHA-256 as recorded" if data.metadata is not None else "no SHA-256 recorded"
        print(f"{data.prefix}: {data.num_tokens:,} tokens, largest id {largest}, {sums}")
    print(f"read {len(reading.read)} files in {reading.seconds:.1f} s")
