"""Megatron's options for a mixture of experts, which the families that have one share."""


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
    """Options for experts that a top-k router chooses, without any loss that would balance them.

    Args:
        width, shared_width: inner sizes of a routed expert and of the shared ones together (None: there are none).
        sigmoid: scores by sigmoid, in float32, with a correction bias that only chooses; otherwise by softmax.
        softmax_over_all: the softmax goes over all experts and not over the chosen ones only.
        groups: number of groups of experts and how many of them a token may choose from; None: no groups.
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
