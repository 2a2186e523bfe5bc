"""Finds the file of a quantization policy. Needs no torch."""

from pathlib import Path

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.similar_names import did_you_mean

SHIPPED = Path(__file__).parent / "policies"
"""Directory of the policies that are part of the package."""


def find_policy(policy: str) -> Path:
    """Return the file of a policy: a shipped one by its name, or a YAML file by its path.

        >>> find_policy("nvfp4-all-linear").name
        'nvfp4-all-linear.yaml'

    Raises:
        QADError: there is no such policy; the error names similar ones.
    """
    path = Path(policy) if policy.endswith((".yaml", ".yml")) else SHIPPED / f"{policy}.yaml"
    if path.is_file():
        return path
    shipped = sorted(file.stem for file in SHIPPED.glob("*.yaml"))
    raise QADError(
        f"no quantization policy {policy!r}{did_you_mean(policy, shipped)}. Give an existing YAML file or "
        f"one of {', '.join(shipped)}."
    )
