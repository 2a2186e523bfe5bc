"""Computes the Mamba layers of transformers' Nemotron-H with the operations of ``ssd`` if GPU kernels are missing.

transformers' own code for this case (5.14.1) differs from the kernels. It is right only up to ``chunk_size`` tokens,
and it limits time steps from below by ``time_step_min``, which is for initial values. It is also slow, because it
multiplies every pair of tokens of a chunk elementwise.
"""

import types

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_qad.engine.cpu.ssd import chunk_scan_combined


def use_own_scan(model: torch.nn.Module) -> None:
    """Make the Mamba layers of a Nemotron-H use our scan where they have no GPU kernels. Leaves other models alone."""
    if model.config.model_type != "nemotron_h":
        return
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

    for module in model.modules():
        if isinstance(module, NemotronHMamba2Mixer):
            module.torch_forward = types.MethodType(_forward, module)


def _forward(
    mixer: torch.nn.Module, hidden_states: Tensor, cache_params=None, attention_mask: Tensor | None = None
) -> Tensor:
    """Replaces ``torch_forward``: [b, s, hidden] to [b, s, hidden]. ``attention_mask`` [b, >= s] is 0 for padding."""
    layer, groups, heads, length = mixer.layer_idx, mixer.n_groups, mixer.num_heads, hidden_states.shape[1]
    is_token = 1 if attention_mask is None else attention_mask[:, -length:, None].to(hidden_states.dtype)
    projected = mixer.in_proj(hidden_states * is_token)
    gate, xBC, dt = projected.split((mixer.intermediate_size, mixer.conv_dim, heads), dim=-1)
    xBC, state = xBC.transpose(1, 2), None
    if cache_params is not None:
        if cache_params.has_previous_state(layer):
            cached = cache_params.layers[layer]
            xBC, state = torch.cat([cached.conv_states[0], xBC], dim=-1), cached.recurrent_states[0]
        cache_params.update_conv_state(pad(xBC, (mixer.conv_kernel_size - xBC.shape[-1], 0)), layer)
    xBC = mixer.act(mixer.conv1d(xBC)[..., : xBC.shape[-1]]).transpose(1, 2)[:, -length:] * is_token
    x, B, C = xBC.split((mixer.intermediate_size, *2 * (groups * mixer.ssm_state_size,)), dim=-1)
    y, state = chunk_scan_combined(
        x.unflatten(-1, (heads, -1)),
        dt,
        -mixer.A_log.float().exp(),
        B.unflatten(-1, (groups, -1)),
        C.unflatten(-1, (groups, -1)),
        mixer.chunk_size,
        D=mixer.D,
        dt_bias=mixer.dt_bias,
        dt_softplus=True,
        initial_states=state,
        dt_limit=mixer.time_step_limit or (0.0, float("inf")),
        return_final_states=True,
    )
    if cache_params is not None:
        cache_params.update_recurrent_state(state, layer)
    return mixer.out_proj(mixer.norm(y.flatten(-2), gate).to(hidden_states.dtype))
