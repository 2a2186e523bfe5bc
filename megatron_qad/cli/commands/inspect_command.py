"""Show which format a policy gives each layer of a model.

    megatron-qad inspect --hf-model DIR --policy nvfp4-all-linear

Reads only DIR/config.json. Prints every linear with its format and size, the totals, and the exclusion list of the
export. With --tensors: prints every tensor of the exported checkpoint with its size.
"""

import argparse
import json
from collections.abc import Sequence

from megatron_qad.cli.command_parser import command_parser


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("inspect", __doc__)
    parser.add_argument("--hf-model", required=True, metavar="DIR", help="Hugging Face directory, or its config.json")
    parser.add_argument("--policy", required=True, help="name of a shipped policy, or a YAML file (docs/policies.md)")
    parser.add_argument(
        "--rule",
        nargs="+",
        action="extend",
        default=[],
        help="rules to append to the policy, such as head=nvfp4, 'decoder.layers.0.*=bf16' or kv_cache=fp8",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON, with a row for every expert")
    parser.add_argument(
        "--tensors",
        nargs="?",
        const="modelopt",
        choices=("modelopt", "compressed-tensors"),
        metavar="LAYOUT",
        help="print name, dtype and shape of every tensor of an export in this layout (default: modelopt)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(argv)

    from megatron_qad.report.policy_report import report_policy
    from megatron_qad.report.tensor_inventory import exported_tensors, render_inventory

    report = report_policy(options.hf_model, options.policy, options.rule)
    if options.tensors:
        tensors = exported_tensors(report, options.tensors)
        print(
            json.dumps([vars(t) for t in tensors], indent=1) if options.json else "\n".join(render_inventory(tensors))
        )
        return
    print(json.dumps(report.as_json(), indent=1) if options.json else "\n".join(report.lines()))
