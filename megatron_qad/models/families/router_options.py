"""Experts in a ``config.json`` and Megatron's mixture-of-experts options, shared by the families with experts."""

from megatron_qad.engine import config_values as values
from megatron_qad.engine.errors import QADError


def num_experts(config: dict, key: str, num_layers: int) -> int:
    """Return the number of routed experts of a layer. ``num_layers``: the number of layers with experts."""
    count = values.integer(config, key, maximum=values.MAX_EXPERTS)
    if count * num_layers > values.MAX_EXPERTS:
        raise QADError(
            f"{values.place(config)}: {key} {count} in {num_layers} layers are more than {values.MAX_EXPERTS:,} "
            "experts. Correct the number."
        )
    return count


def experts_per_token(config: dict, num_experts: int) -> int:
    """Return ``num_experts_per_tok``, at most the number of experts."""
    return values.integer(config, "num_experts_per_tok", maximum=num_experts)


def router_args(
    *,
    num_experts: int,
    top_k: int,
    width: int,
    shared_width: int | None = None,
    latent_size: int | None = None,
    sigmoid: bool = False,
    softmax_over_all: bool = False,
    scaling_factor: float | None = None,
    groups: tuple[int, int] | None = None,
) -> dict:
    """Return Megatron options for experts with a top-k router and without a load-balancing loss.

    Args:
        width: inner width of a routed expert.
        shared_width: total inner width of the shared experts. None means no shared experts.
        latent_size: size of the latent space of the routed experts. None means the hidden size.
        sigmoid: compute scores by sigmoid in float32, with a correction bias that only affects the choice of experts.
            Otherwise scores are computed by softmax.
        softmax_over_all: apply the softmax to all experts instead of only the chosen ones.
        scaling_factor: factor of the scores. None means 1.
        groups: number of expert groups, and number of groups that a token may choose from. None means no groups.
    """
    num_groups, group_topk = groups or (None, None)
    return {
        "num-experts": num_experts,
        "moe-router-topk": top_k,
        "moe-ffn-hidden-size": width,
        "moe-shared-expert-intermediate-size": shared_width,
        "moe-latent-size": latent_size,
        "moe-router-score-function": "sigmoid" if sigmoid else "softmax",
        "moe-router-enable-expert-bias": sigmoid,
        "moe-router-dtype": "fp32" if sigmoid else None,
        "moe-router-pre-softmax": softmax_over_all,
        "moe-router-topk-scaling-factor": scaling_factor,
        "moe-router-num-groups": num_groups,
        "moe-router-group-topk": group_topk,
        "moe-router-load-balancing-type": "none",
        "moe-token-dispatcher-type": "alltoall",
    }
