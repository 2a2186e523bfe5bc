"""The options that QAD adds to Megatron's. Each field is a flag (``--qad-...``) and a YAML key; its docstring is the
help text."""

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class QADOptions:
    """Quantization-aware distillation"""

    qad_teacher: str | None = None
    """Checkpoint directory of the frozen BF16 teacher, written by megatron-qad import. Required unless --qad-loss
    is ce."""

    qad_student: str | None = None
    """Checkpoint directory with the student's initial weights, written by megatron-qad import. Default: the teacher's
    weights."""

    qad_loss: str = "kl"
    """Training loss. QAD: 'kl', the KL divergence from teacher to student. QAT: 'ce', the cross entropy. Others:
    'reverse_kl', 'jsd', 'confidence_kl', 'topk', 'mse'. To be combined with one of these: 'hidden_mse' and
    'hidden_cosine', which compare outputs of layers, and 'scale_growth', a penalty on growing block scales. Losses are
    combined as a weighted sum such as 'kl(temperature=2) + 0.5*ce'; a weight may follow a schedule
    ('linear(1, 0, 100, 500)*ce': 1 until step 100, 0 from step 500 on). A path reads the loss from a YAML file.
    Default: kl."""

    qad_temperature: float = 1.0
    """Softmax temperature of teacher and student, for losses between distributions that set none themselves. Default:
    1, as in the paper."""

    qad_policy: str = "nvfp4-all-linear"
    """Quantization policy: the name of a shipped policy or a YAML file. 'bf16' turns quantization off. Default:
    nvfp4-all-linear."""

    qad_policy_override: list[str] = field(
        default_factory=list, metadata={"argparse_meta": {"type": str, "nargs": "+", "action": "extend"}}
    )
    """Rules appended to the policy, KIND=FORMAT or MODULE_PATTERN=FORMAT, such as head=nvfp4; the last match wins.
    'expert=nvfp4:four_over_six:frozen' also sets the scale rule and the update of the scales. Rules of repeated flags
    and of --config files add up. Default: none."""

    qad_weight_scale_rule: str = "mse:frozen"
    """How the block scales of NVFP4 weights are chosen where the policy names no rule: 'max' (maps the largest
    magnitude of a block to 6), 'four_over_six' (maps it to 6 or 4, whichever has the smaller error), 'mse' (searches
    for the scale with the smallest error), or modelopt's searches 'mse_multipliers', 'mse_sweep' and 'local_hessian'
    (docs/policies.md). With ':frozen' they are chosen once, for the initial weights, otherwise before every step. The
    stored format is the same. Default: mse:frozen."""

    qad_calibration_samples: int = 64
    """Number of training sequences that set the amax of the activation quantizers before the first step, rounded up to
    whole microbatches; at most 65536. Default: 64."""

    qad_calibration_percentile: float | None = None
    """Share, in %%, of an input's non-zero magnitudes that its amax covers, such as 99.99; larger magnitudes saturate.
    Default: off, the amax is the maximum."""

    qad_calibration_headroom: float | None = None
    """Raise the amax of NVFP4 inputs to this factor, such as 16384, times a small block of the calibration (percentile
    1), so that larger inputs than those of the calibration do not saturate; below 28672. The top 0.01 %% of the blocks
    may saturate. Default: off."""

    qad_train_router: bool = False
    """Train the routers of expert layers and update their bias by the load. Default: off, routers stay equal to the
    teacher's, so that tokens keep their experts."""

    qad_layer_spec: str | None = None
    """Implementation of the layers: 'te' (Transformer Engine) or 'local' (torch). Default: te if it is installed and a
    GPU is available, otherwise local."""

    qad_pad_documents_to: int | None = None
    """Pad each document of a packed row to a multiple of this many tokens; needs --dataloader-inter-document-masking.
    Default: twice the context-parallel size, which context parallelism needs; 1 (no padding) without it."""

    qad_teacher_micro_batch_size: int | None = None
    """Number of sequences in a microbatch of the teacher's forward pass, a multiple of --micro-batch-size. Default:
    --micro-batch-size."""

    qad_teacher_cpu_offload: bool = False
    """Keep the teacher's layers in host memory and copy them to the device one after the other, once per step for all
    microbatches. For teachers that do not fit on the device together with the student; pipeline stages then wait for
    each other. Default: off."""

    qad_vision_align_corners: bool = False
    """Resize the table of the vision encoder's position embeddings with corners aligned, as NVlabs/RADIO did until June
    2025. vLLM, TensorRT-LLM and transformers do not align them. For data with images only. Default: off."""

    qad_fused_linear_loss: Literal["auto", "always", "never"] = "auto"
    """Whether the output layer and the loss are computed together, in chunks of tokens, without ever storing all logits
    of a microbatch: 'always' (an error with jsd, which reads all logits twice), 'never', or 'auto' (if the logits of
    one microbatch of both models exceed 1 GiB per rank). Default: auto."""

    qad_teacher_output: Literal["auto", "hidden", "logits"] = "auto"
    """Teacher output that is stored for each microbatch until the loss is computed: 'logits', 'hidden' (the final
    hidden states; the loss applies the output layer), or 'auto' (the smaller one). A fused output layer needs
    'hidden'. Default: auto."""

    qad_keep_last: int | None = None
    """Number of newest checkpoints to keep; older ones are deleted unless --qad-keep-best keeps them. Default: keep
    all; with --qad-keep-best alone, keep the newest, and delete only when enough checkpoints have been validated to
    choose from."""

    qad_keep_best: int | None = None
    """Number of checkpoints with the lowest validation KL to keep, in addition to the newest. Needs a validation at
    each save (--save-interval a multiple of --eval-interval). Default: off."""

    qad_on_nan: Literal["stop", "skip"] = "stop"
    """What to do if a loss or a gradient is NaN or Inf, or if no token of a step counts in the loss: 'stop' the job, or
    'skip' the update of that step. The log names the step, and for NaN and Inf also the rank and the layer. Ten
    skipped steps in a row stop the job. Default: stop."""

    qad_spike_factor: float | None = None
    """Roll back to the last good checkpoint in --save, and skip the batches since, if a loss exceeds this factor times
    the median of the last 64 losses. Must be above 1, such as 5. Default: off."""

    qad_hang_timeout: float | None = None
    """Seconds without progress after which the job names the rank that is behind and ends; 0 turns it off. Must exceed
    the longest single part of a step; loading, saving and rolling back may take ten times as long. Default: 9/10 of
    --distributed-timeout-minutes."""

    qad_ptq: bool = False
    """Post-training quantization only: calibrate, save and validate the student as iteration 1. Nothing is trained, so
    that the job holds no gradients and no optimizer. Default: off."""

    qad_ptq_sequential: bool = False
    """Hold one layer of the model at a time in a --qad-ptq job, and the hidden states of all calibration and validation
    sequences in host memory. For models that do not fit into memory; data parallelism only. Default: off."""

    qad_job_dir: str | None = None
    """Directory for messages between a batch script and the job: a file 'stop' in it makes the job save after the
    current step and exit with status 0. Default: the environment variable QAD_JOB_DIR, which launch/slurm.sbatch
    sets; without it, off."""

    qad_verbose: bool = False
    """Show on the terminal what Megatron and other packages print. Default: off; it goes to megatron.log in --save
    (from the last rank to megatron.rankN.log), and without --save nowhere."""

    qad_dry_run: bool = False
    """Print the plan (model, formats, parallelism, tokens, epochs, bytes per rank, estimated time) and exit without
    building weights. Reads the flags, the data and the checkpoint to resume, and refuses what the job would refuse.
    Default: off."""

    qad_dry_run_tensors: bool = False
    """Print a row for each linear in the dry run. Default: off, layers that differ only in their number share a row."""

    @classmethod
    def from_args(cls, parsed: argparse.Namespace) -> "QADOptions":
        """Return the options that a parser with these flags has read."""
        return cls(**{f.name: getattr(parsed, f.name) for f in dataclasses.fields(cls)})
