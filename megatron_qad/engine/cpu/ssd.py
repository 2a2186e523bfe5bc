"""Mamba-2's operations in plain torch, with autograd: the causal convolution, the chunked scan, the gated norm.

On any device, these compute the same as the GPU kernels of ``mamba_ssm`` and ``causal_conv1d``, which they replace
where the packages are missing (``mamba_packages``). Inputs in reduced precision are computed in float32, as in the
kernels. A row may contain several documents, separated by ``seq_idx`` int [b, l]: neither the convolution nor the state
crosses from one into the next.

Source: Dao and Gu, "Transformers are SSMs", arXiv:2405.21060, section 6. Letters in shapes: b rows, l tokens, h heads,
p head size, g groups (the h / g heads of a group share B and C), n state size, c chunks, q tokens in a chunk.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, silu, softplus


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None = None) -> Tensor:
    """Depthwise causal convolution over the tokens.

    Args:
        x: [b, l, d].
        weight: [d, width]; the last tap is the token itself.
        bias: [d] or None.
    """
    width = weight.shape[1]
    out = x * weight[:, -1]
    for lag in range(1, min(width, x.shape[1])):
        earlier = pad(x[:, :-lag], (0, 0, lag, 0))
        if seq_idx is not None:
            is_same_document = seq_idx[:, lag:] == seq_idx[:, :-lag]
            earlier = earlier * pad(is_same_document, (lag, 0)).unsqueeze(-1)
        out = out + earlier * weight[:, -1 - lag]
    return out if bias is None else out + bias


def chunked_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence state = exp(dt A) state + dt B x, y = C state, one chunk of tokens at a time.

    Args:
        x: [b, l, h, p].
        dt: [b, l, h], positive.
        A: [h], negative.
        B, C: [b, l, g, n].
        initial_state: [b, h, p, n]. None means zeros.

    Returns:
        y [b, l, h, p] and the last state [b, h, p, n], in ``x``'s dtype.
    """
    rows, length, heads, size = x.shape
    state = x.new_zeros(rows, heads, size, B.shape[-1]) if initial_state is None else initial_state.to(x.dtype)
    document = None if seq_idx is None else seq_idx[:, 0]
    B, C = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    parts = []
    for start in range(0, length, chunk_size):
        chunk = slice(start, start + chunk_size)
        seq = None if seq_idx is None else seq_idx[:, chunk]
        y, state = _scan_chunk(x[:, chunk], dt[:, chunk], A, B[:, chunk], C[:, chunk], state, seq, document)
        document = None if seq is None else seq[:, -1]
        parts.append(y)
    return torch.cat(parts, dim=1), state


def _scan_chunk(x, dt, A, B, C, state, seq, document) -> tuple[Tensor, Tensor]:
    """Return y [b, q, h, p] of one chunk and the state after it. ``document`` [b] is the document of ``state``."""
    x, B, C = (t.transpose(1, 2) for t in (x, B, C))  # [b, h, q, .]
    dt = dt.transpose(1, 2)  # [b, h, q]
    log_decay = (dt * A[:, None]).cumsum(-1)  # of the state before the chunk, up to and including each token
    causal = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool, device=x.device).tril()
    to_state, from_state = torch.exp(log_decay[..., -1:] - log_decay), torch.exp(log_decay)
    keep = torch.exp(log_decay[..., -1])
    if seq is not None:
        causal = (causal & (seq[:, :, None] == seq[:, None, :])).unsqueeze(1)
        to_state = to_state * (seq == seq[:, -1:]).unsqueeze(1)
        from_state = from_state * (seq == document[:, None]).unsqueeze(1)
        keep = keep * (seq[:, -1] == document).unsqueeze(1)
    # Masked before the exponential: it would overflow above the diagonal, and the gradient 0 * inf would be NaN.
    decay = torch.exp((log_decay[..., :, None] - log_decay[..., None, :]).masked_fill(~causal, -torch.inf))
    scores = (C @ B.transpose(-1, -2)) * decay * dt[..., None, :]
    y = scores @ x + (C @ state.transpose(-1, -2)) * from_state[..., None]
    new = (x * (to_state * dt)[..., None]).transpose(-1, -2) @ B
    return y.transpose(1, 2), keep[..., None, None] * state + new


def wide(x: Tensor) -> Tensor:
    """Convert ``x`` to the precision of the computation: float64 stays, all else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
):
    """Replaces ``mamba_ssm``'s ``mamba_chunk_scan_combined``: step sizes, scan, skip connection D and gate silu(z).

    Args:
        x: [b, l, h, p]; dt: [b, l, h]; A: [h]; B, C: [b, l, g, n]; D: [h] or [h, p]; z: like x.

    Returns:
        [b, l, h, p] in ``x``'s dtype; with ``return_final_states`` also the state [b, h, p, n].
    """
    dtype = x.dtype
    x, dt, A, B, C = (wide(t) for t in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + wide(dt_bias)
    if dt_softplus:
        dt = softplus(dt)
    if tuple(dt_limit) != (0.0, float("inf")):
        dt = dt.clamp(*dt_limit)
    y, state = chunked_scan(x, dt, A, B, C, chunk_size, seq_idx, initial_states)
    if D is not None:
        y = y + x * (wide(D) if D.dim() == 2 else wide(D)[:, None])
    if z is not None:
        y = y * silu(wide(z))
    return (y.to(dtype), state) if return_final_states else y.to(dtype)


def split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    activation: str = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = False,
) -> Tensor:
    """Replaces ``mamba_ssm``'s ``mamba_split_conv1d_scan_combined`` without its optional norm and output projection.

    This is a Mamba-2 mixer between its two linear layers, without the norm.

    Args:
        zxbcdt: [b, l, 2 di + 2 g n + h] with di = h p: the gate z, the inputs x, B and C of the convolution, and the
            step sizes.
        conv1d_weight: [di + 2 g n, width].
        D: [h] with ``headdim`` given, or [h, p].

    Returns:
        [b, l, di], gated by silu(z), in ``zxbcdt``'s dtype.
    """
    if activation != "silu" or norm_before_gate:
        raise NotImplementedError(
            f"activation {activation!r}, norm_before_gate {norm_before_gate}: only silu before the norm is supported."
        )
    heads = dt_bias.shape[0]
    size = D.shape[1] if headdim is None else headdim
    inner = heads * size
    z, xBC, dt = zxbcdt.split((inner, conv1d_weight.shape[0], heads), dim=-1)
    state = (conv1d_weight.shape[0] - inner) // 2
    bias = None if conv1d_bias is None else wide(conv1d_bias)
    xBC = silu(causal_conv1d(wide(xBC), wide(conv1d_weight), bias, seq_idx)).to(zxbcdt.dtype)
    x, B, C = xBC.split((inner, state, state), dim=-1)
    y = chunk_scan_combined(
        x.unflatten(-1, (heads, size)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        chunk_size,
        D=D,
        z=z.unflatten(-1, (heads, size)),
        dt_bias=dt_bias,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
    )
    return y.flatten(-2)


class GatedRMSNorm(torch.nn.Module):
    """Replaces ``mamba_ssm``'s gated ``RMSNorm``: RMS norm over groups of the last axis, with the gate silu(z).

    ``norm_before_gate`` applies the gate after the norm instead of before it.
    """

    def __init__(self, hidden_size, eps=1e-5, group_size=None, norm_before_gate=True, device=None, dtype=None):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size or hidden_size, norm_before_gate
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalize and gate ``x`` [..., hidden] with ``z`` [..., hidden]."""
        y = wide(x)
        if z is not None and not self.norm_before_gate:
            y = y * silu(wide(z))
        groups = y.unflatten(-1, (-1, self.group_size))
        y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)).flatten(-2) * wide(self.weight)
        if z is not None and self.norm_before_gate:
            y = y * silu(wide(z))
        return y.to(x.dtype)
