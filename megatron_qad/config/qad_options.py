"""What QAD adds to Megatron's arguments. Every field is a flag (``--qad-...``), a YAML key, and its docstring the
help."""

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class QADOptions:
    """Quantization-aware distillation"""

    qad_teacher: str | None = None
    """Checkpoint directory of the frozen BF16 teacher, as tools/import_hf.py writes it. Required unless --qad-loss
    is ce."""

    qad_student: str | None = None
    """Checkpoint directory with the student's initial weights, as tools/import_hf.py writes it. Default: the
    teacher's."""

    qad_loss: str = "kl"
    """Training loss: 'kl' (KL divergence from teacher to student, which is QAD), 'ce' (cross entropy, which is QAT),
    'reverse_kl', 'jsd', 'confidence_kl', 'topk', 'mse'; 'hidden_mse' and 'hidden_cosine' of layers' outputs and the
    penalty 'scale_growth' only beside one of those; a weighted sum such as 'kl(temperature=2) + 0.5*ce' whose
    weights may follow a schedule ('linear(1, 0, 100, 500)*ce': 1 until step 100, 0 from step 500 on), or a YAML
    file."""

    qad_temperature: float = 1.0
    """Temperature of teacher and student in the losses between distributions that name none themselves; 1 is the
    report's."""

    qad_policy: str = "nvfp4-all-linear"
    """Quantization policy: a shipped one's name or a YAML file. 'bf16' turns quantization off."""

    qad_policy_override: list[str] = field(
        default_factory=list, metadata={"argparse_meta": {"type": str, "nargs": "+", "action": "extend"}}
    )
    """Rules appended to the policy, KIND=FORMAT or MODULE_PATTERN=FORMAT, such as head=nvfp4; the last match wins.
    Given again, here or in --config, it adds more."""

    qad_weight_scale_rule: str = "max"
    """How the block scales of NVFP4 weights are chosen: 'max' (the block's largest value becomes 6), 'four_over_six' (6
    or 4, whichever errs less) or 'mse' (a search). All are stored alike."""

    qad_calibration_samples: int = 64
    """Training sequences whose activations set the quantizers' amax before the first step, rounded up to whole
    microbatches."""

    qad_calibration_percentile: float | None = None
    """Share, in %%, of an input's non-zero magnitudes that its amax covers, such as 99.99; the rest saturates. Default:
    all of them, the maximum."""

    qad_train_router: bool = False
    """Train the routers of expert layers, and let their bias follow the load. Default: both stay the teacher's, which
    keeps each token at its experts."""

    qad_layer_spec: str | None = None
    """Layers to build from: 'te' (Transformer Engine) or 'local' (torch). Default: te where it is installed and a GPU
    is there."""

    qad_pad_documents_to: int | None = None
    """With --dataloader-inter-document-masking: documents of a row start at multiples of this many tokens. Default:
    what context parallelism needs, twice its size; 1 without."""

    qad_teacher_micro_batch_size: int | None = None
    """Sequences in a microbatch of the teacher's forward pass, a multiple of --micro-batch-size. Default: the
    student's."""

    qad_teacher_cpu_offload: bool = False
    """Keep the teacher's layers in host memory and copy them to the device one after the other, once a step for all its
    microbatches: for teachers that do not fit beside the student. Pipeline stages then wait for each other."""

    qad_fused_linear_loss: Literal["auto", "always", "never"] = "auto"
    """Compute the output layer and the loss together, in chunks of tokens, so that the logits of a microbatch never
    exist as a whole: 'always' (refused for jsd, which reads all logits twice), 'never', or 'auto', where the logits of
    one microbatch of both models take more than 1 GiB of a rank."""

    qad_teacher_output: Literal["auto", "hidden", "logits"] = "auto"
    """What the teacher's pass keeps of each microbatch until the loss: 'logits', 'hidden' (its final hidden states, to
    which the loss applies the output layer), or 'auto', the smaller. A fused output layer needs 'hidden'."""

    qad_keep_last: int | None = None
    """Checkpoints to keep, the newest ones; older ones are removed unless --qad-keep-best keeps them. Default:
    all; with --qad-keep-best alone, the newest one, once enough were validated to choose from."""

    qad_keep_best: int | None = None
    """Checkpoints to keep because their validation KL is the lowest, beside the newest. Needs a validation at each save
    (--save-interval a multiple of --eval-interval)."""

    qad_on_nan: Literal["stop", "skip"] = "stop"
    """What happens when a loss or a gradient is NaN or Inf, or when no token of a step counts in the loss: 'stop', or
    'skip' the update of that step; either way the log names the step, and of NaN rank and layer."""

    qad_spike_factor: float | None = None
    """A loss above this many times the median of the last 64 goes back to the last good checkpoint in --save, leaving
    out the batches since; such as 5. Default: never."""

    qad_hang_timeout: float | None = None
    """Seconds without progress after which a job names the rank that is behind and ends. Default: 9/10 of
    --distributed-timeout-minutes; 0 turns it off. Must exceed the longest single part of a step. Parts of the start, a
    save and a rollback may take ten times as long."""

    qad_ptq: bool = False
    """Post-training quantization only: calibrate, quantize, evaluate, save; one iteration at learning rate 0."""

    qad_job_dir: str | None = None
    """Directory through which a batch script and the job talk: a file 'stop' there makes the job save after the current
    step and exit with status 0. Default: the environment's QAD_JOB_DIR, which launch/slurm.sbatch sets."""

    qad_dry_run: bool = False
    """Print the plan (model, formats, layout, tokens, bytes per rank) and exit without building weights."""

    @classmethod
    def from_args(cls, parsed: argparse.Namespace) -> "QADOptions":
        """Of what a parser that knows these flags found."""
        return cls(**{f.name: getattr(parsed, f.name) for f in dataclasses.fields(cls)})
