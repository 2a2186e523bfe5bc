"""How a job is divided over ranks and microbatches."""

import argparse
from dataclasses import dataclass

RECOMPUTATIONS = ("none", "selective", "full")
"""What runs again in the backward pass. ``selective``: the core attention. ``full``: whole layers."""


@dataclass(frozen=True)
class Layout:
    """Parallelism, batch and recomputation of one job. The number of ranks is ``tp * pp * cp * dp``.

    Example::

        layout = Layout(tp=4, sequence_parallel=True, dp=2, seq_length=8192, global_batch_size=64)
        layout.world_size, layout.num_microbatches  # 8, 32
    """

    tp: int = 1
    """Tensor-parallel size."""
    pp: int = 1
    """Pipeline-parallel size."""
    vpp: int = 1
    """Virtual pipeline stages per rank."""
    cp: int = 1
    """Context-parallel size."""
    ep: int = 1
    """Expert-parallel size."""
    etp: int = 1
    """Tensor-parallel size of routed experts."""
    dp: int = 1
    """Data-parallel size, not counting context parallelism."""
    sequence_parallel: bool = False
    """Whether tensor-parallel ranks share the tokens of norms and residuals."""
    seq_length: int = 4096
    """Tokens of a row."""
    micro_batch_size: int = 1
    """Rows of a microbatch."""
    global_batch_size: int = 1
    """Rows of a step."""
    is_packed: bool = False
    """Whether a row holds several documents. The rows of a microbatch are then joined."""
    recompute: str = "none"
    """One of ``RECOMPUTATIONS``."""
    recompute_layers: int = 1
    """Layers that full recomputation runs again together, or with ``recompute_block`` the number that it runs again."""
    recompute_block: bool = False
    """Whether full recomputation covers the first ``recompute_layers`` layers of a stage only."""
    distributed_optimizer: bool = False
    """Whether data-parallel ranks share the optimizer's state."""
    element_bytes: int = 2
    """Bytes of a weight or activation: 2 for BF16, 4 for float32."""
    gradient_bytes: int = 2
    """Bytes of an accumulated gradient."""

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "Layout":
        """Return the layout of a job, from Megatron's validated arguments."""
        granularity = args.recompute_granularity or "none"
        if granularity == "selective" and "core_attn" not in (args.recompute_modules or ["core_attn"]):
            granularity = "none"  # what other modules save is small; it is counted as if it were kept
        element_bytes = 2 if args.bf16 else 4
        return cls(
            tp=args.tensor_model_parallel_size,
            pp=args.pipeline_model_parallel_size,
            vpp=args.virtual_pipeline_model_parallel_size or 1,
            cp=args.context_parallel_size,
            ep=args.expert_model_parallel_size,
            etp=args.expert_tensor_parallel_size or args.tensor_model_parallel_size,
            dp=args.data_parallel_size,
            sequence_parallel=args.sequence_parallel,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            global_batch_size=args.global_batch_size,
            is_packed=args.dataloader_inter_document_masking,
            recompute=granularity,
            recompute_layers=args.recompute_num_layers or 1,
            recompute_block=args.recompute_method == "block",
            distributed_optimizer=args.use_distributed_optimizer,
            element_bytes=element_bytes,
            gradient_bytes=4 if args.accumulate_allreduce_grads_in_fp32 else element_bytes,
        )

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def num_expert_copies(self) -> int:
        """Number of ranks that hold the same experts."""
        return self.world_size // (self.etp * self.ep * self.pp)

    @property
    def num_microbatches(self) -> int:
        """Microbatches of a step on each data-parallel rank."""
        return self.global_batch_size // (self.micro_batch_size * self.dp)

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch on a context-parallel rank."""
        return self.micro_batch_size * self.seq_length // self.cp

    @property
    def sharded_tokens(self) -> int:
        """Tokens of a microbatch on a rank, where sequence parallelism divides them."""
        return self.tokens // self.tp if self.sequence_parallel else self.tokens
