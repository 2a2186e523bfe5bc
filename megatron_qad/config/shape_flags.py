"""Refuses Megatron's flags of the model's architecture if they contradict the checkpoint, which determines it."""

import argparse
from collections.abc import Mapping, Sequence

from megatron_qad.engine.errors import QADError

_PATTERN = "hybrid-layer-pattern"
_ARCHITECTURE = (
    *(_PATTERN, "hybrid-override-pattern", "mtp-hybrid-override-pattern", "mtp-num-layers", "is-hybrid-model"),
    *("encoder-num-layers", "decoder-num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads"),
    *("group-query-attention", "num-query-groups", "kv-channels", "window-size", "window-attn-skip-freq"),
    *("normalization", "norm-epsilon", "apply-layernorm-1p", "apply-residual-connection-post-layernorm"),
    *("position-embedding-type", "max-position-embeddings", "rotary-base", "rotary-percent", "rotary-interleaved"),
    *("rotary-seq-len-interpolation-factor", "use-rope-scaling", "rope-scaling-factor", "no-rope-freq"),
    *("swiglu", "squared-relu", "openai-gelu", "quick-geglu", "glu-linear-offset", "activation-func-clamp-value"),
    *("disable-bias-linear", "add-qkv-bias", "qk-layernorm", "qk-l2-norm", "softmax-type", "attention-output-gate"),
    *("untie-embeddings-and-output-weights", "vocab-size", "multi-latent-attention", "linear-attention-freq"),
    *("num-experts", "moe-layer-freq", "moe-ffn-hidden-size", "moe-shared-expert-intermediate-size"),
    *("moe-shared-expert-gate", "moe-latent-size", "moe-router-topk", "moe-router-num-groups"),
    *("moe-router-group-topk", "moe-router-pre-softmax", "moe-router-score-function"),
    *("moe-router-topk-scaling-factor", "moe-router-enable-expert-bias"),
    *(
        "mamba-num-heads",
        "mamba-head-dim",
        "mamba-num-groups",
        "mamba-state-dim",
        "spec",
        "experimental-attention-variant",
    ),
    *("heterogeneous-layers-config-path", "heterogeneous-layers-config-encoded-json"),
)


def check_shape_flags(
    argv: Sequence[str],
    from_checkpoint: Sequence[str],
    parser: argparse.ArgumentParser,
    num_layers: Mapping[int, str],
    checkpoint: str,
) -> None:
    """Check that the flags give the model the shape that its checkpoint has.

    Args:
        argv: the job's complete command line, in which flags of the user override those of the checkpoint.
        from_checkpoint: flags of the machine and the checkpoint alone.
        num_layers: valid values of ``--num-layers``, and what they count.
        checkpoint: the student's checkpoint directory, for the error.

    Raises:
        QADError: names the flag, its value and that of the checkpoint.
    """
    parsed, _ = parser.parse_known_args(list(argv))
    expected, _ = parser.parse_known_args(list(from_checkpoint))
    source = f"the model in {checkpoint} (hf/config.json)"
    advice = "Leave the flag out: the checkpoint determines the model."
    for name in _ARCHITECTURE:
        action = parser._option_string_actions.get(f"--{name}")
        if action is None:
            continue
        found, right = getattr(parsed, action.dest), getattr(expected, action.dest)
        if found == right or name == _PATTERN and _is_same_pattern(found, right):
            continue
        if action.nargs == 0:
            raise QADError(f"--{name}: contradicts {source}, which does not have it. {advice}")
        raise QADError(f"--{name} {_text(found)}: contradicts {source}, which has {_text(right)}. {advice}")
    found = getattr(parsed, "num_layers", None)
    if found is not None and found not in num_layers:
        right = " or ".join(f"{number} ({what})" for number, what in num_layers.items())
        raise QADError(f"--num-layers {found}: contradicts {source}, which has {right}. {advice}")


def _is_same_pattern(found: str, right: str) -> bool:
    """Whether two patterns have the same layers and as many pipeline stages, which may be cut differently."""
    return found.replace("|", "") == right.replace("|", "") and found.count("|") == right.count("|")


def _text(value: object) -> str:
    if value is None:
        return "none"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
