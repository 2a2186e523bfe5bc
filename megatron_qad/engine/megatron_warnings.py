"""Hides warnings of Megatron and transformers that users cannot act on and that each command would print."""

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

HIDDEN_ON_CPU = ("CPU RNG state changed within GPU RNG context",)
"""The CPU backend has one generator, so that drawing from "the GPU's" always changes the CPU's. On a GPU the warning
tells of a difference between tensor-parallel ranks, and is logged."""

TOKENIZER_ONLY = " to instantiate a model of type ``. "
"""Part of a warning of transformers. It appears when only the tokenizer of a model with its own code is loaded."""

_LOGGERS = ("megatron.core.dist_checkpointing.strategies.torch", "megatron.core.tensor_parallel.random")
_LOGGERS += ("transformers.configuration_utils",)


def hide(*, on_cpu: bool = False) -> None:
    """Hide the warnings in ``HIDDEN``, now and later; ``on_cpu`` also those of the CPU backend. Calls add up."""
    for text in HIDDEN:
        warnings.filterwarnings("ignore", message=re.escape(text))
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_shown_on_cpu if on_cpu else _is_shown)


def _is_shown(record: logging.LogRecord) -> bool:
    return not (record.getMessage().startswith(HIDDEN) or TOKENIZER_ONLY in record.getMessage())


def _is_shown_on_cpu(record: logging.LogRecord) -> bool:
    return _is_shown(record) and not record.getMessage().startswith(HIDDEN_ON_CPU)
