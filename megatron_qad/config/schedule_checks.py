"""Checks the length of the training, the learning rate and the weight decay: Megatron's assertions, in plain words."""

from megatron_qad.config.megatron_flags import MegatronFlags
from megatron_qad.engine.errors import QADError


def check_schedule(flags: MegatronFlags) -> None:
    """Check the flags of a job that trains; see ``check_length`` for one that does not.

    Raises:
        QADError: a flag is missing, or two of them contradict each other.
    """
    check_length(flags)
    if flags.lr is None:
        raise QADError("--lr is not set; the learning rate has no default. The paper's are between 1e-6 and 1e-5.")
    for flag, value in (("--min-lr", flags.min_lr), ("--lr-warmup-init", flags.lr_warmup_init)):
        if value > flags.lr:
            raise QADError(f"{flag} {value:g}: is above --lr {flags.lr:g}. Expected a rate up to --lr.")
    _check_unit(flags)
    _check_decay(flags)
    _check_weight_decay(flags)
    if flags.override_opt_param_scheduler and flags.use_checkpoint_opt_param_scheduler:
        raise QADError(
            "--override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler contradict each other: the first "
            "takes the schedule of the flags, the second that of the checkpoint. Remove one of them."
        )


def check_length(flags: MegatronFlags) -> None:
    """Check that the training has one length, of at least one step."""
    if flags.train_iters is None and flags.train_samples is None:
        raise QADError("--train-iters is not set; it is the number of training steps. Set it, or --train-samples.")
    if flags.train_iters is not None and flags.train_samples is not None:
        raise QADError(
            f"--train-iters {flags.train_iters} and --train-samples {flags.train_samples} both give the length of the "
            "training. Remove one of them."
        )
    if flags.train_samples is not None and flags.train_samples < (flags.global_batch_size or 1):
        raise QADError(
            f"--train-samples {flags.train_samples}: is less than one step of {flags.global_batch_size} samples "
            "(--global-batch-size). Expected at least one step."
        )


def _check_unit(flags: MegatronFlags) -> None:
    """Check that lengths are all in iterations or all in samples, as the training length is."""
    iters = {"--lr-decay-iters": flags.lr_decay_iters, "--lr-wsd-decay-iters": flags.lr_wsd_decay_iters}
    samples = {"--lr-decay-samples": flags.lr_decay_samples, "--lr-wsd-decay-samples": flags.lr_wsd_decay_samples}
    iters["--lr-warmup-iters"], samples["--lr-warmup-samples"] = flags.lr_warmup_iters, flags.lr_warmup_samples
    wrong, length, unit = (samples, "--train-iters", "iters")
    if flags.train_samples is not None:
        wrong, length, unit = (iters, "--train-samples", "samples")
    for flag, value in wrong.items():
        if value:
            right = f"{flag.rpartition('-')[0]}-{unit}"
            raise QADError(f"{flag} {value}: the training has its length from {length}. Use {right}.")
    for flag, value in (*iters.items(), *samples.items()):
        if "warmup" in flag and value and flags.lr_warmup_fraction is not None:
            raise QADError(
                f"{flag} {value} and --lr-warmup-fraction {flags.lr_warmup_fraction:g} both give the length of the "
                "warmup. Remove one of them."
            )


def _check_decay(flags: MegatronFlags) -> None:
    if flags.train_samples is not None:
        unit, total, warmup = "samples", flags.train_samples, flags.lr_warmup_samples
        decay, wsd_decay = flags.lr_decay_samples, flags.lr_wsd_decay_samples
    else:
        unit, total, warmup = "iters", flags.train_iters, flags.lr_warmup_iters
        decay, wsd_decay = flags.lr_decay_iters, flags.lr_wsd_decay_iters
    end, flag = (total, f"--train-{unit}") if decay is None else (decay, f"--lr-decay-{unit}")
    if warmup >= end:
        raise QADError(
            f"--lr-warmup-{unit} {warmup}: the warmup is as long as {flag} {end} or longer, so the learning rate would "
            f"never reach --lr and decay. Expected less than {end}."
        )
    if flags.lr_decay_style == "WSD" and (wsd_decay is None or wsd_decay > end):
        found = "is not set" if wsd_decay is None else f"{wsd_decay}: is longer than {flag} {end}"
        raise QADError(
            f"--lr-wsd-decay-{unit} {found}. --lr-decay-style WSD needs the length of its last part, the decay, up to "
            f"{end}."
        )


def _check_weight_decay(flags: MegatronFlags) -> None:
    start, end, style = flags.start_weight_decay, flags.end_weight_decay, flags.weight_decay_incr_style
    if style == "constant" and (start is not None or end is not None):
        raise QADError(
            "--start-weight-decay and --end-weight-decay need --weight-decay-incr-style linear or cosine; the weight "
            "decay is constant without it."
        )
    if style != "constant" and (start is None or end is None or end < start):
        raise QADError(
            f"--weight-decay-incr-style {style} needs --start-weight-decay and --end-weight-decay, the second not "
            f"below the first; found {start} and {end}."
        )
