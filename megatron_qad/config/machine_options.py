"""Megatron flags that the machine and the method determine, independent of the model."""

import importlib.util

from megatron_qad.engine import Capabilities


def machine_options(machine: Capabilities, layer_spec: str | None = None) -> dict:
    """Return option names and values. They come before the user's flags, which therefore override them."""
    options = {
        "calculate-per-token-loss": True,  # losses are sums; the division by the global token count happens once
        "attention-dropout": 0.0,  # Megatron's default of 0.1 would be most of the KL between equal models
        "hidden-dropout": 0.0,
        "no-create-attention-mask-in-dataloader": True,  # attention is causal by the layer spec
        "ckpt-format": "torch_dist",
        "exit-signal-handler": True,  # SIGTERM saves after the current step (training/callbacks/preemption.py)
        "no-check-for-nan-in-loss-and-grad": True,  # callbacks/nan_guard.py checks, and can also skip an update
        # Megatron's default, nvrx, is a separate package.
        "async-strategy": "nvrx" if importlib.util.find_spec("nvidia_resiliency_ext") else "mcore",
        "dist-ckpt-optim-fully-reshardable": True,  # the default resumes with other DP sizes only
        "save-interval": 1000,  # Megatron has no default and stops at --save without one
        "eval-interval": 1000,  # without a value Megatron raises a TypeError
        "tokenizer-type": "NullTokenizer",  # the data is already tokenized; its metadata names the tokenizer
    }
    if (layer_spec or machine.layer_spec) == "local":
        # These fused kernels come with Transformer Engine or apex.
        options |= {
            "transformer-impl": "local",
            "no-persist-layer-norm": True,
            "no-rope-fusion": True,
            "no-masked-softmax-fusion": True,
        }
    if not machine.fuses_gradient_accumulation:
        options["no-gradient-accumulation-fusion"] = True  # on by default in Megatron, which needs an extension for it
    if machine.backend == "gloo":
        options["distributed-backend"] = "gloo"
    return options
