"""What a policy does to a model: ``python tools/inspect_policy.py --hf-model DIR --policy nvfp4-all-linear``.

Reads only DIR/config.json and prints every linear with its format and bytes, the totals, and the exclusion list as the
export will write it. With --tensors: every tensor of the exported checkpoint, and its bytes.
"""

import argparse
import json
import sys

from megatron_qad.engine import QADError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-model", required=True, metavar="DIR", help="Hugging Face directory, or its config.json")
    parser.add_argument("--policy", required=True, help="a shipped policy's name or a YAML file (docs/policies.md)")
    parser.add_argument(
        "--rule",
        nargs="+",
        action="extend",
        default=[],
        help="rules appended to the policy, such as head=nvfp4, 'decoder.layers.0.*=bf16' or kv_cache=fp8",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON, every expert on its own")
    parser.add_argument(
        "--tensors",
        nargs="?",
        const="modelopt",
        choices=("modelopt", "compressed-tensors"),
        metavar="LAYOUT",
        help="print instead name, dtype and shape of every tensor that an export writes, in this layout (modelopt)",
    )
    options = parser.parse_args()

    from megatron_qad.report.policy_report import report_policy
    from megatron_qad.report.tensor_inventory import exported_tensors, render_inventory

    found = report_policy(options.hf_model, options.policy, options.rule)
    if options.tensors:
        tensors = exported_tensors(found, options.tensors)
        print(
            json.dumps([vars(t) for t in tensors], indent=1) if options.json else "\n".join(render_inventory(tensors))
        )
        return
    print(json.dumps(found.as_json(), indent=1) if options.json else "\n".join(found.lines()))


if __name__ == "__main__":
    try:
        main()
    except QADError as error:
        sys.exit(f"error: {error}")
