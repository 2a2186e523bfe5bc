"""The flags of Megatron that follow from the machine and from the method, not from the model."""

import importlib.util

from megatron_qad.engine import Capabilities


def machine_options(machine: Capabilities, layer_spec: str | None = None) -> dict:
    """Option names and values that stand before the user's own flags, which therefore win."""
    options = {
        "calculate-per-token-loss": True,  # losses are sums; the division by the global token count happens once
        "attention-dropout": 0.0,  # Megatron's default of 0.1 would be most of the KL between equal models
        "hidden-dropout": 0.0,
        "no-create-attention-mask-in-dataloader": True,  # attention is causal by the layer spec
        "ckpt-format": "torch_dist",
        "exit-signal-handler": True,  # SIGTERM saves after the current step (training/callbacks/preemption.py)
        "no-check-for-nan-in-loss-and-grad": True,  # callbacks/nan_guard.py does, and can do more than stop
        # Megatron's default, nvrx, is a package of its own.
        "async-strategy": "nvrx" if importlib.util.find_spec("nvidia_resiliency_ext") else "mcore",
        "save-interval": 1000,  # Megatron has no default and stops at --save without one
        "eval-interval": 1000,  # the same, with a TypeError
        "tokenizer-type": "NullTokenizer",  # the data is tokenized already; its metadata names the tokenizer
    }
    if (layer_spec or machine.layer_spec) == "local":
        # Fused kernels that come with Transformer Engine or apex.
        options |= {
            "transformer-impl": "local",
            "no-persist-layer-norm": True,
            "no-rope-fusion": True,
            "no-masked-softmax-fusion": True,
        }
    if not machine.fuses_gradient_accumulation:
        options["no-gradient-accumulation-fusion"] = True  # Megatron's default; it stops where the extension is missing
    if machine.backend == "gloo":
        options["distributed-backend"] = "gloo"
    return options
