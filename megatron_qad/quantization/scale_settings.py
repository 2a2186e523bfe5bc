"""How the scales of a quantized weight are obtained: the rule that chooses them, and whether training updates them."""

from dataclasses import dataclass

from megatron_qad.engine.errors import QADError
from megatron_qad.formats.block_scales import SCALE_RULES
from megatron_qad.formats.format_registry import FORMATS
from megatron_qad.formats.nvfp4 import BLOCK_SIZE

UPDATES = ("every_step", "frozen")
"""``every_step``: the scales are computed from the current weight before each step. ``frozen``: they are computed once,
from the initial weight, and only the weight is trained."""
PLAIN_SWEEP = "mse_sweep"
"""Rule with the candidates of ``local_hessian`` and the plain squared error."""


@dataclass(frozen=True)
class ScaleSetting:
    """The scale rule and the update of one linear's weight."""

    rule: str = "max"
    """Rule that chooses the block scales, one of ``SCALE_RULES``."""
    update: str = "every_step"
    """One of ``UPDATES``."""

    @property
    def is_frozen(self) -> bool:
        return self.update == "frozen"

    @property
    def needs_moments(self) -> bool:
        """Whether the block scales depend on second moments of the linear's input (``input_moments``)."""
        return self.rule == "local_hessian"

    def __str__(self) -> str:
        """Return "RULE:UPDATE", or "RULE" if the scales are updated every step, as in a rule on the command line."""
        return f"{self.rule}:{self.update}" if self.is_frozen else self.rule

    @classmethod
    def parse(cls, text: str, where: str) -> "ScaleSetting":
        """Return the setting of a string that ``str`` made.

        Raises:
            QADError: with ``where``, for any other string.
        """
        rule, separator, update = str(text).partition(":")
        setting = cls(rule, update) if separator else cls(rule)
        if rule not in SCALE_RULES or setting.update not in UPDATES:
            raise QADError(
                f"{where}: found scales {text!r:.200}, expected one of {', '.join(SCALE_RULES)}, followed by ':frozen' "
                "for frozen scales."
            )
        return setting


NEW_JOBS = ScaleSetting("mse", "frozen")
"""Setting of a new job where neither its policy nor a flag names one. It ended with the lowest KL in docs/policies.md,
"Which rule". A run whose record names none is older and had ``ScaleSetting()``."""


def has_block_scale_rules(fmt: str) -> bool:
    """Whether weights of a format have block scales that a rule chooses and that can be frozen."""
    number_format = FORMATS[fmt].weight
    return number_format is not None and len(number_format.scale_rules) > 1


def moments_bytes(columns: int) -> int:
    """Return the bytes of the second moments (``input_moments``) of an input with this number of columns."""
    return columns * BLOCK_SIZE * 4
