"""Core attention of the local layer spec, using torch's ``scaled_dot_product_attention``.

Megatron's own torch attention stores all scores, [b, heads, s, s], and supports neither context parallelism nor packed
sequences. Transformer Engine supports both, but needs its GPU kernels. This module supports both on any device, and
equals Megatron's attention where that applies (tests/dist/test_attention.py). Not supported: sliding windows, softmax
offsets, masks other than causal ones.

Under context parallelism (see ``context_parallel`` for the token order) keys and values, which are small with grouped
queries, are gathered over the group, and each chunk of a rank attends to all tokens before its end.
"""

from contextlib import nullcontext

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from megatron_qad.engine.errors import QADError
from megatron_qad.models.context_parallel import document_lengths, gather_in_order, spans

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)
# Without cuDNN's backend, which builds a new plan for every document length.
_VARLEN_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class CoreAttention(MegatronModule):
    """Causal softmax(q k^T * scale) v with grouped queries. It has no parameters.

    Args:
        config, layer_number, attn_mask_type, attention_type, softmax_scale, pg_collection: the arguments that Megatron
            passes to every core attention. ``pg_collection`` needs ``cp``.
        cp_comm_type: ignored; keys and values are always gathered.

    Raises:
        QADError: the config needs a kind of attention that is not supported.
    """

    def __init__(
        self,
        config,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(config=config)
        for name, expected in {"window_size": None, "softmax_type": "vanilla"}.items():
            if getattr(config, name, expected) != expected:
                raise QADError(
                    f"attention: {name}={getattr(config, name)!r} is not supported by the local layer spec, which "
                    f"needs {name}={expected!r}. Use Transformer Engine (--qad-layer-spec te)."
                )
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"])
        self.cp_group = groups.cp
        # Query-key layer scaling is ignored: Megatron cancels it before the softmax, so it does not change the result.
        self.softmax_scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params=None,
    ) -> Tensor:
        """Compute one layer's attention on this rank.

        Args:
            query, key, value: [s/cp, b, heads or groups, head dim]; packed: [t/cp, heads or groups, head dim].
            attention_mask: None or Megatron's causal mask; it is not read.
            packed_seq_params: documents of a packed row, with global token offsets ``cu_seqlens_q`` int
                [documents + 1]. Under context parallelism each length must be a multiple of ``2 * cp``. None means that
                every row is one sequence.

        Returns:
            [s/cp, b, heads * head dim], contiguous; packed: [t/cp, heads * head dim].
        """
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        if mask_type not in _CAUSAL or attention_bias is not None:
            raise QADError(
                f"attention: mask type {mask_type} or an attention bias is not supported by the local layer spec, "
                "which is causal. Use Transformer Engine (--qad-layer-spec te)."
            )
        is_packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        if is_packed:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        rank, size = self.cp_group.rank(), self.cp_group.size()
        lengths = document_lengths(packed_seq_params) if is_packed else [query.shape[0] * size]
        if size > 1:
            key, value = gather_in_order(key, value, lengths, self.cp_group)
        dropout = self.dropout if self.training else 0.0
        # Tensor-parallel ranks must drop different scores. Under sequence parallelism their default RNG states differ.
        forked = dropout and not self.config.sequence_parallel
        kernels = sdpa_kernel(_VARLEN_BACKENDS) if is_packed else nullcontext()
        with get_cuda_rng_tracker().fork() if forked else nullcontext(), kernels:
            parts = [
                _attend(query[a:b], key[c:d], value[c:d], self.softmax_scale, dropout)
                for a, b, c, d in spans(lengths, rank, size)
            ]
        context = parts[0] if len(parts) == 1 else torch.cat(parts)
        context = context.flatten(2)
        return context.squeeze(1) if is_packed else context


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float) -> Tensor:
    """Return attention [s_q, b, heads, head dim]. The last query sees all keys, the one before it all but one, etc."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    is_square = q.shape[2] == k.shape[2]
    out = scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if is_square else causal_lower_right(q.shape[2], k.shape[2]),
        dropout_p=dropout,
        is_causal=is_square,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.permute(2, 0, 1, 3).contiguous()
