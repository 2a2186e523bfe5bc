"""The Megatron flags that QAD itself reads, as one frozen object.

About 800 other flags are passed to Megatron unread. The defaults equal those of Megatron's parser (a test compares
them), so that a configuration can be built and checked where Megatron is not installed.
"""

import argparse
import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class MegatronFlags:
    """Values before Megatron derives some from others: the user's flags, and ``machine_options`` for the rest."""

    # Parallelism.
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    """Expert tensor-parallel size. None means the tensor-parallel size."""
    num_virtual_stages_per_pipeline_rank: int | None = None
    sequence_parallel: bool = False
    tensor_parallel_num_weight_shards: int | None = None
    expert_tensor_parallel_num_weight_shards: int | None = None
    hybrid_context_parallel: bool = False

    # Batch.
    seq_length: int | None = None
    micro_batch_size: int | None = None
    global_batch_size: int | None = None
    rampup_batch_size: list[int] | None = None
    dataloader_inter_document_masking: bool = False

    # Durations and intervals.
    train_iters: int | None = None
    train_samples: int | None = None
    skip_train: bool = False
    eval_iters: int | None = None
    """Iterations of an evaluation. None means that the user set none; Megatron's own default is 100."""
    eval_interval: int | None = None
    save_interval: int | None = None
    skip_train: bool = False
    iterations_to_skip: list[int] = dataclasses.field(default_factory=list)

    # Learning rate and weight decay.
    lr: float | None = None
    min_lr: float = 0.0
    lr_warmup_init: float = 0.0
    lr_warmup_fraction: float | None = None
    lr_warmup_iters: int = 0
    lr_warmup_samples: int = 0
    lr_decay_style: str = "linear"
    lr_decay_iters: int | None = None
    lr_decay_samples: int | None = None
    lr_wsd_decay_iters: int | None = None
    lr_wsd_decay_samples: int | None = None
    weight_decay: float = 0.01
    weight_decay_incr_style: str = "constant"
    start_weight_decay: float | None = None
    end_weight_decay: float | None = None
    override_opt_param_scheduler: bool = False
    use_checkpoint_opt_param_scheduler: bool = False

    # Data.
    data_path: list[str] | None = None
    train_data_path: list[str] | None = None
    valid_data_path: list[str] | None = None
    test_data_path: list[str] | None = None
    data_args_path: str | None = None
    per_split_data_args_path: str | None = None
    mock_data: bool = False
    split: str | None = None

    # Precision and optimizer.
    use_distributed_optimizer: bool = False
    bf16: bool = False
    fp16: bool = False
    fp8: str | None = None
    fp4: str | None = None
    fp8_param_gather: bool = False
    fp4_param_gather: bool = False
    use_precision_aware_optimizer: bool = False
    use_megatron_fsdp: bool = False
    use_torch_fsdp2: bool = False
    cuda_graph_impl: str = "none"
    overlap_moe_expert_parallel_comm: bool = False
    moe_aux_loss_coeff: float | list[float] = 0.0
    moe_z_loss_coeff: float | None = None

    # Directories and loggers.
    save: str | None = None
    load: str | None = None
    ckpt_format: str = "torch_dist"
    enable_msc: bool = False
    no_save_optim: bool | None = None
    save_retain_interval: int | None = None
    tensorboard_dir: str | None = None
    wandb_project: str | None = None
    wandb_exp_name: str | None = None
    wandb_save_dir: str | None = None

    # Tokenizer.
    make_vocab_size_divisible_by: int = 128
    tokenizer_type: str | None = None
    tokenizer_model: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def from_args(cls, parsed: argparse.Namespace) -> "MegatronFlags":
        """Return the flags that a parser has read; flags that the parser does not know keep their defaults."""
        names = [field.name for field in dataclasses.fields(cls)]
        flags = cls(**{name: getattr(parsed, name) for name in names if hasattr(parsed, name)})
        older_name = getattr(parsed, "encoder_seq_length", None)
        return flags if flags.seq_length is not None else dataclasses.replace(flags, seq_length=older_name)

    @property
    def num_virtual_stages(self) -> int:
        """Number of virtual pipeline stages per rank."""
        return self.num_virtual_stages_per_pipeline_rank or 1

    @property
    def model_parallel_ranks(self) -> int:
        """Number of ranks that share one copy of the model, not counting its experts."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
