"""Hides warnings of Megatron about its own optional packages and plans, which would surround every line of a tool."""

import logging
import re
import warnings

HIDDEN = (
    "Transformer Engine and Apex are not installed. ",
    "Apex is not installed. Falling back to Torch Norm",
    "Only transformer-engine>=1.7.0 supports MoE experts",
    "Could not determine rank from torch.distributed, RANK, or SLURM_PROCID",
    "Please specify --split when using --data-path",
    "MCore's async save is deprecated and will be removed in the future releases",
)
"""Beginnings of the messages. What was chosen instead is in the log (``Capabilities.report``) or in a job's notes."""

_LOGGER = "megatron.core.dist_checkpointing.strategies.torch"


def hide() -> None:
    """Hide the warnings in ``HIDDEN``, now and later. A second call changes nothing."""
    for text in HIDDEN:
        warnings.filterwarnings("ignore", message=re.escape(text))
    logging.getLogger(_LOGGER).addFilter(_is_shown)


def _is_shown(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(HIDDEN)
