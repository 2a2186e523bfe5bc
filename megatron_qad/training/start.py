"""Starts a job from its configuration: takes its directory, installs what a job replaces, lets Megatron parse."""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Sequence

from megatron_qad.config import refusals
from megatron_qad.config.job_config import JobConfig, read_job_config
from megatron_qad.config.megatron_flags import MegatronFlags
from megatron_qad.config.qad_options import QADOptions
from megatron_qad.engine import capabilities, megatron_fixes
from megatron_qad.engine.events import Callback
from megatron_qad.engine.loggers import Loggers, continue_wandb_run
from megatron_qad.engine.megatron_args import make_parser, parse_globally
from megatron_qad.engine.run_directory import locks
from megatron_qad.models.context_parallel import partitioned_indices
from megatron_qad.training.job import QADJob


def read_command_line(argv: Sequence[str], *, trains: bool = True) -> JobConfig:
    """The configuration of a command line on this machine; see ``config.job_config.read_job_config``."""
    return read_job_config(argv, make_parser(QADOptions), capabilities(), os.environ, trains=trains)


def start_job(config: JobConfig, callbacks: Sequence[Callback] = ()) -> QADJob:
    """Take ``--save`` for this process, install what a job replaces, and have Megatron parse its flags.

    Args:
        callbacks: told of the job's events after its own.

    Raises:
        QADError: another process writes to ``--save``. Megatron's own checks raise as they do upstream.
    """
    flags = config.flags
    if flags.save is not None and not config.options.qad_dry_run and os.environ.get("RANK", "0") == "0":
        # The first rank asks, because the ranks do not know each other yet; if it is refused, the launcher ends the
        # others. Parsing already starts wandb and TensorBoard, which write.
        locks.lock_directory(flags.save, "--save")
    atexit.register(_end_data_workers)
    if not config.options.qad_dry_run:
        continue_wandb_run(flags.wandb_project, flags.save, os.environ)
    loggers = Loggers(flags.save, flags.tensorboard_dir, flags.wandb_save_dir or f"{flags.save}/wandb")
    loggers.install()
    _fix_megatron()
    args = parse_globally(config.megatron_argv, QADOptions, config.world_size)
    derived = MegatronFlags.from_args(args)  # flags that Megatron makes of others, such as --enable-cuda-graph
    refusals.check_masters(derived)
    refusals.check_step(derived)
    if not args.async_save:
        megatron_fixes.save_checkpoints_in_this_process()
    return QADJob(config, args, loggers, callbacks)


def _fix_megatron() -> None:
    megatron_fixes.use_compiled_dataset_helpers()
    megatron_fixes.load_reshardable_state_of_torch_adam()
    if capabilities().device == "cpu":
        megatron_fixes.dispatch_tokens_on_cpu()
    if capabilities().layer_spec == "local":
        megatron_fixes.pack_mamba_rows_without_te(partitioned_indices)


def _end_data_workers() -> None:
    """Megatron lets data workers ignore SIGTERM, too. When a rank fails, multiprocessing sends it to them and waits for
    them, for ever; all other ranks wait for this one."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error for each that is killed
    for worker in multiprocessing.active_children():
        worker.kill()
