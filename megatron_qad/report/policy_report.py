"""Policy report: formats, sizes and exclusion list of a model under a policy, computed from ``config.json`` alone.

Formats are resolved with the code of a job, exclusions with the code of the export.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_qad.checkpoint.layouts import PACKED_LAYOUTS, exclusions
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.local_models import missing_config
from megatron_qad.engine.text_files import read_json
from megatron_qad.formats.format_registry import FORMATS, UNQUANTIZED
from megatron_qad.models.families import family_of
from megatron_qad.quantization import policy as policies
from megatron_qad.quantization.format_table import BF16_BYTES, Row, format_rows, render, totals
from megatron_qad.quantization.policy_warnings import policy_warnings


@dataclass(frozen=True)
class PolicyReport:
    """A policy resolved for a model."""

    architecture: str
    layer_pattern: str
    num_weights: int
    """Number of elements of all tensors, including embeddings, norms and the vision encoder."""
    policy: policies.Policy
    rows: list[Row]
    """Every linear that a policy can select, in model order."""
    exclude_modules: list[str]
    """Excluded modules by exact Hugging Face name, as in the configurations of the packed layouts."""
    hf_config: dict
    warnings: list[str]
    """From ``policy_warnings``."""

    @property
    def bytes_before(self) -> int:
        """Size of the model in BF16."""
        return BF16_BYTES * self.num_weights

    @property
    def bytes_after(self) -> int:
        """Size of the model with packed linears. Every other tensor counts as BF16, whatever its dtype."""
        return self.bytes_before - sum(row.bytes_before - row.bytes_after for row in self.rows)

    def lines(self) -> Iterator[str]:
        """Yield the lines of the report for a terminal."""
        yield f"model       {self.architecture}, {self.num_weights:,} weights, layers {self.layer_pattern}"
        yield f"policy      {self.policy.name}: " + "; ".join(map(str, self.policy.rules))
        yield f"KV cache    {self.policy.kv_cache}"
        yield from (f"WARNING     {warning}." for warning in self.warnings)
        yield ""
        yield from render(self.rows)
        yield ""
        share = self.bytes_after / self.bytes_before
        yield (
            f"model       {self.bytes_before:,} bytes in BF16, {self.bytes_after:,} bytes after ({share:.1%}), "
            "including embeddings, norms and all other tensors"
        )
        for name in sorted({row.format for row in self.rows} - {UNQUANTIZED.name}):
            if len(layouts := tuple(FORMATS[name].stored)) < len(PACKED_LAYOUTS):
                yield f"            {name}: exported by --layout {' or '.join(layouts) or 'bf16'} only"
        yield ""
        yield f"exclusions  {len(self.exclude_modules)} modules, by exact name"
        yield from (f"  {name}" for name in self.exclude_modules)

    def as_json(self) -> dict:
        """Return the report as JSON data, with a row for every expert."""
        return {
            "architecture": self.architecture,
            "layer_pattern": self.layer_pattern,
            "num_weights": self.num_weights,
            "policy": self.policy.name,
            "rules": [str(rule) for rule in self.policy.rules],
            "kv_cache": self.policy.kv_cache,
            "warnings": self.warnings,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "totals": {name: dataclasses.asdict(total) for name, total in totals(self.rows).items()},
            "linears": [
                {key: value for key, value in dataclasses.asdict(row).items() if key not in ("num", "layers")}
                for row in self.rows
            ],
            "exclude_modules": self.exclude_modules,
        }


def report_policy(hf_model: str | Path, policy: str, overrides: Sequence[str] = ()) -> PolicyReport:
    r"""Resolve a policy for a model, reading only its configuration.

    Args:
        hf_model: a Hugging Face directory, or a ``config.json`` file of any name.
        policy: name of a shipped policy, or a YAML file.
        overrides: additional rules as text, as in ``--qad-policy-override``.

    Raises:
        QADError: a missing file, an unsupported architecture, or an invalid policy.

    Example::

        report = report_policy("my_model", "nvfp4-all-linear", ["head=fp8"])
        print("\n".join(report.lines()))
        print(report.bytes_after / report.bytes_before)
    """
    file = Path(hf_model) if Path(hf_model).is_file() else Path(hf_model) / "config.json"
    if not file.is_file():
        raise QADError(missing_config(hf_model, "Give the directory of a Hugging Face model, or that file."))
    return resolve_report(read_json(file), policies.load(policy, overrides, flag="--rule"))


def resolve_report(hf_config: dict, policy: policies.Policy) -> PolicyReport:
    """Resolve a policy for a model given its parsed config; see ``report_policy``."""
    family = family_of(hf_config)
    linears = family.linears(hf_config)
    layer_kinds = family.layer_kinds(hf_config)
    formats = policies.resolve(policy, linears, layer_kinds)
    scales = policies.resolve_scales(policy, linears, layer_kinds)
    rows = format_rows(linears, formats, scales)
    quantized = [name for row in rows if FORMATS[row.format].quantizes for name in row.hf]
    return PolicyReport(
        architecture=family.architecture,
        layer_pattern=family.layer_pattern(hf_config),
        num_weights=sum(math.prod(tensor.shape) for tensor in family.all_tensors(hf_config)),
        policy=policy,
        rows=rows,
        exclude_modules=exclusions(family.linear_modules(hf_config), quantized),
        hf_config=hf_config,
        warnings=policy_warnings(linears, scales),
    )
