"""Writes docs/flags.md and the list of flag names: ``python tools/flags_page.py``.

- docs/flags.md, the flags that QAD adds to Megatron's. They are the fields of ``QADOptions``
  (megatron_qad/config/qad_options.py), and their docstrings are the meanings.
- megatron_qad/cli/flag_names.txt, the names of all flags of a job, by which typos are found without importing torch.
  The first line is the version of megatron-core that has them.

tests/unit/tools/test_flags_page.py fails if one of them is older than the code or the installed Megatron.
"""

import dataclasses
import importlib.metadata
import re
import sys
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_qad.cli.early_checks import FLAG_NAMES  # noqa: E402
from megatron_qad.cli.job_help import qad_flags  # noqa: E402
from megatron_qad.config.qad_options import QADOptions  # noqa: E402

PAGE = ROOT / "docs/flags.md"
GROUPS = {
    "Models and loss": ("qad_teacher", "qad_student", "qad_loss", "qad_temperature"),
    "Formats and scales": ("qad_policy", "qad_policy_override", "qad_weight_scale_rule"),
    "Calibration": ("qad_calibration_samples", "qad_calibration_percentile", "qad_calibration_headroom"),
    "Quantization without training": ("qad_ptq", "qad_ptq_sequential"),
    "Memory and speed": (
        "qad_layer_spec",
        "qad_teacher_micro_batch_size",
        "qad_teacher_cpu_offload",
        "qad_fused_linear_loss",
        "qad_teacher_output",
    ),
    "Data, images and routers": ("qad_pad_documents_to", "qad_vision_align_corners", "qad_train_router"),
    "Checkpoints and failures": (
        "qad_keep_last",
        "qad_keep_best",
        "qad_on_nan",
        "qad_spike_factor",
        "qad_hang_timeout",
        "qad_job_dir",
    ),
    "Output": ("qad_verbose", "qad_dry_run", "qad_dry_run_tensors"),
}
"""The fields of ``QADOptions`` under each heading. A test fails if a field is missing."""
HEAD = """\
# Flags
The flags that QAD adds to Megatron's. This page is made from `megatron_qad/config/qad_options.py` by
`python tools/flags_page.py`; a test fails if it is older than the code.

- **Megatron's flags** work as in Megatron: parallelism, batch size, schedule, saving, logging.
  `megatron-qad train --help` lists the flags of this page and the most used ones of Megatron, `--help-all` all of them.
- **Config files.** Every flag is a key of `--config FILE.yaml`, without the leading dashes. `--config` may be repeated;
  a later file overrides an earlier one, and the command line overrides both. An unknown key is an error that names the
  nearest valid one.
- **The model's shape** comes from the checkpoint and needs no flag.
"""


def flag_of(field: str) -> str:
    """Return the flag of a field: ``--qad-loss`` for ``qad_loss``."""
    return f"--{field.replace('_', '-')}"


def default_of(field: dataclasses.Field) -> str:
    """Return the text of the column "default"."""
    if field.default_factory is not dataclasses.MISSING:
        return "none"
    if field.default is None or field.default is False:
        return "off" if field.default is False else "-"
    return f"`{field.default}`"


def row(field: dataclasses.Field, meaning: str) -> str:
    """Return the table row of a flag. If its type is a ``Literal``, the meaning begins with the values."""
    meaning = re.sub(r" Default: [^.]*(?:\.\d[^.]*)*\.$", "", meaning) if field.default is not None else meaning
    meaning = re.sub(r"(?<!\w)'([^']*)'(?!\w)", r"`\1`", meaning).replace("|", "\\|")
    meaning = re.sub(r"(?<![\w`-])--[a-z][a-z-]*[a-z]", r"`\g<0>`", meaning)
    meaning = re.sub(r"\bdocs/(\w+\.md)", r"[\1](\1)", meaning)
    values = typing.get_args(field.type) if typing.get_origin(field.type) is typing.Literal else ()
    choices = f"One of {', '.join(f'`{value}`' for value in values)}. " if values else ""
    return f"| `{flag_of(field.name)}` | {default_of(field)} | {choices}{meaning} |"


def page() -> str:
    """Return the content of docs/flags.md."""
    fields, texts = {field.name: field for field in dataclasses.fields(QADOptions)}, qad_flags()
    lines = [HEAD.rstrip()]
    for heading, names in GROUPS.items():
        lines += ["", f"## {heading}", "| flag | default | meaning |", "|---|---|---|"]
        lines += [row(fields[name], texts[flag_of(name)]) for name in names]
    return "\n".join(lines) + "\n"


def flag_names() -> str:
    """Return the content of cli/flag_names.txt. Imports Megatron."""
    from megatron_qad.engine import init_runtime

    init_runtime(for_compute=True)
    from megatron_qad.engine.megatron_args import make_parser

    options = {option for action in make_parser(QADOptions)._actions for option in action.option_strings}
    names = {option for option in options if option.startswith("--")} | {"--config"}
    return "\n".join([importlib.metadata.version("megatron-core"), *sorted(names)]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    FLAG_NAMES.write_text(flag_names(), encoding="utf-8")
