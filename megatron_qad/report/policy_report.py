"""What a policy does to a model, from its ``config.json`` alone: the table, the bytes, the exclusion list.

The formats are resolved as a job resolves them, and the exclusions are those that the export writes: the same code.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_qad.checkpoint.hf_reader import read_json
from megatron_qad.checkpoint.layouts import PACKED_LAYOUTS, exclusions
from megatron_qad.engine.errors import QADError
from megatron_qad.formats.format_registry import FORMATS, UNQUANTIZED
from megatron_qad.models.families import family_of
from megatron_qad.quantization import policy as policies
from megatron_qad.quantization.format_table import BF16_BYTES, Row, format_rows, render, totals


@dataclass(frozen=True)
class PolicyReport:
    """A policy resolved on a model."""

    architecture: str
    layer_pattern: str
    num_weights: int
    """All tensors of the model, embeddings, norms and vision encoder included."""
    policy: policies.Policy
    rows: list[Row]
    """Every linear that a policy reaches, in model order."""
    exclude_modules: list[str]
    """Exact Hugging Face names, as the packed layouts' configurations have them."""
    hf_config: dict

    @property
    def bytes_before(self) -> int:
        """The whole model in BF16."""
        return BF16_BYTES * self.num_weights

    @property
    def bytes_after(self) -> int:
        """The whole model with packed linears. Counted as BF16: what is no quantized linear, whatever its dtype."""
        return self.bytes_before - sum(row.bytes_before - row.bytes_after for row in self.rows)

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        yield f"model       {self.architecture}, {self.num_weights:,} weights, layers {self.layer_pattern}"
        yield f"policy      {self.policy.name}: " + "; ".join(map(str, self.policy.rules))
        yield f"KV cache    {self.policy.kv_cache}"
        yield ""
        yield from render(self.rows)
        yield ""
        share = self.bytes_after / self.bytes_before
        yield (
            f"model       {self.bytes_before:,} bytes in BF16, {self.bytes_after:,} bytes after ({share:.1%}), "
            "embeddings, norms and all else included"
        )
        for name in sorted({row.format for row in self.rows} - {UNQUANTIZED.name}):
            if len(layouts := tuple(FORMATS[name].stored)) < len(PACKED_LAYOUTS):
                yield f"            {name}: exported by --layout {' or '.join(layouts) or 'bf16'} only"
        yield ""
        yield f"exclusions  {len(self.exclude_modules)} modules, by exact name"
        yield from (f"  {name}" for name in self.exclude_modules)

    def as_json(self) -> dict:
        """All of it, every expert on its own, as plain data."""
        return {
            "architecture": self.architecture,
            "layer_pattern": self.layer_pattern,
            "num_weights": self.num_weights,
            "policy": self.policy.name,
            "rules": [str(rule) for rule in self.policy.rules],
            "kv_cache": self.policy.kv_cache,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "totals": {name: dataclasses.asdict(total) for name, total in totals(self.rows).items()},
            "linears": [
                {key: value for key, value in dataclasses.asdict(row).items() if key != "num"} for row in self.rows
            ],
            "exclude_modules": self.exclude_modules,
        }


def report_policy(hf_model: str | Path, policy: str, overrides: Sequence[str] = ()) -> PolicyReport:
    """Resolve a policy on a model, of which only the configuration is read.

    Args:
        hf_model: a Hugging Face directory, or a ``config.json`` itself, under whatever name.
        policy: a shipped policy's name or a YAML file. ``overrides``: rules as text, as on ``--qad-policy-override``.

    Raises:
        QADError: no such file, an unsupported architecture, or whatever is wrong with the policy.
    """
    file = Path(hf_model) if Path(hf_model).is_file() else Path(hf_model) / "config.json"
    if not file.is_file():
        raise QADError(f"{hf_model}: no config.json; expected the directory of a Hugging Face model, or that file")
    return resolve_report(read_json(file), policies.load(policy, overrides, flag="--rule"))


def resolve_report(hf_config: dict, policy: policies.Policy) -> PolicyReport:
    """The same, from a parsed config."""
    family = family_of(hf_config)
    linears = family.linears(hf_config)
    formats = policies.resolve(policy, linears, family.layer_kinds(hf_config))
    rows = format_rows(linears, formats)
    quantized = [name for row in rows if FORMATS[row.format].quantizes for name in row.hf]
    return PolicyReport(
        architecture=family.architecture,
        layer_pattern=family.layer_pattern(hf_config),
        num_weights=sum(math.prod(tensor.shape) for tensor in family.all_tensors(hf_config)),
        policy=policy,
        rows=rows,
        exclude_modules=exclusions(family.linear_modules(hf_config), quantized),
        hf_config=hf_config,
    )
