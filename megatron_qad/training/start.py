"""Starts a job from its configuration: locks ``--save``, patches Megatron and has it parse its arguments."""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron.training import print_rank_0

from megatron_qad.config import refusals
from megatron_qad.config.job_config import JobConfig, read_job_config
from megatron_qad.config.launch_environment import check_ranks
from megatron_qad.config.megatron_flags import MegatronFlags
from megatron_qad.config.model_config import ModelConfig
from megatron_qad.config.qad_options import QADOptions
from megatron_qad.engine import capabilities, megatron_fixes
from megatron_qad.engine.console import JobOutput
from megatron_qad.engine.distributed import check_port_is_free
from megatron_qad.engine.events import Callback
from megatron_qad.engine.loggers import Loggers
from megatron_qad.engine.megatron_args import make_parser, parse_globally
from megatron_qad.engine.run_directory import locks
from megatron_qad.engine.wandb_run import continue_wandb_run
from megatron_qad.models.context_parallel import partitioned_indices
from megatron_qad.training.job import QADJob, Step
from megatron_qad.training.models import model_config, replace_model_shape
from megatron_qad.training.resume_check import check_resume, checkpoint_to_resume
from megatron_qad.training.run_description import check_scale_state


def read_command_line(argv: Sequence[str], *, trains: bool = True, student: ModelConfig | None = None) -> JobConfig:
    """Read the configuration of a job on this machine; see ``config.job_config.read_job_config``."""
    parser = make_parser(QADOptions)
    return read_job_config(argv, parser, capabilities(), os.environ, trains=trains, student=student)


def start_job(config: JobConfig, callbacks: Sequence[Callback] = ()) -> QADJob:
    """Lock ``--save`` for this process, patch Megatron, have it parse its arguments, and build the job.

    Args:
        callbacks: additional callbacks, which run after the job's own.

    Raises:
        QADError: another process writes to ``--save``, the launcher's variables are incomplete, or Megatron refuses
            the flags.
    """
    flags, is_dry_run = config.flags, config.options.qad_dry_run
    if not is_dry_run:
        check_ranks(os.environ)
        check_port_is_free(os.environ)
    if flags.save is not None and not is_dry_run and os.environ.get("RANK", "0") == "0":
        # Only the first rank takes the lock, because the ranks are not connected yet. If it fails, the launcher ends
        # the others. This comes before parsing, which starts wandb and TensorBoard and so writes files.
        locks.lock_directory(flags.save, "--save")
    output = JobOutput(None if is_dry_run else _log_file(flags.save, os.environ), shows_all=config.options.qad_verbose)
    output.install()
    atexit.register(_end_data_workers)
    if not is_dry_run:
        continue_wandb_run(flags.wandb_project, flags.save, os.environ)
    loggers = Loggers(flags.save, flags.tensorboard_dir, flags.wandb_save_dir or str(flags.save))
    loggers.install()
    _fix_megatron()
    args = parse_globally(config.megatron_argv, QADOptions, config.world_size)
    derived = MegatronFlags.from_args(args)  # Megatron derives flags from others, such as --enable-cuda-graph
    refusals.check_masters(derived)
    refusals.check_step(derived)
    if not args.async_save:
        megatron_fixes.save_checkpoints_in_this_process()
    if not is_dry_run:
        for note in config.notes:
            print_rank_0(f"megatron_qad: {note}")
    return QADJob(config, args, loggers, output, callbacks)


def check_dry_run(job: QADJob, qad_step: Callable[[QADJob, Step], list[dict]]) -> list[str]:
    """Check what a job checks after its start: Megatron's configs, the data, the checkpoint from which it resumes.

    Args:
        qad_step: runs the parts of a step; not called.

    Returns:
        Lines for the plan: how often the data is read.

    Raises:
        QADError: the job would end with the same error.
    """
    job.pretrain_config(qad_step)
    if job.config.teacher is not None:
        model_config(job.config, replace_model_shape(job.config, job.args, job.config.teacher), job.config.teacher)
    dataset_config = job.datasets_provider.check()
    directory = checkpoint_to_resume(job.args)
    if directory is not None:
        check_resume(directory, job.args)
        check_scale_state(job.config, directory.parent)
    args = job.args
    return job.datasets_provider.describe(
        dataset_config, args.train_samples or args.train_iters * args.global_batch_size
    )


def _log_file(save: str | None, environ: Mapping[str, str]) -> Path | None:
    """Return the file for what other packages print on this rank; None if it is dropped.

    Megatron prints on the first rank, and losses on the last one. Each has a file of its own, because two nodes that
    append to one file overwrite each other on NFS. The other ranks would only repeat warnings.
    """
    rank, size = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
    if save is None or rank not in (0, size - 1):
        return None
    return Path(save) / ("megatron.log" if rank == 0 else f"megatron.rank{rank}.log")


def _fix_megatron() -> None:
    megatron_fixes.use_compiled_dataset_helpers()
    megatron_fixes.load_reshardable_state_of_torch_adam()
    if capabilities().device == "cpu":
        megatron_fixes.dispatch_tokens_on_cpu()
    if capabilities().layer_spec == "local":
        megatron_fixes.pack_mamba_rows_without_te(partitioned_indices)


def _end_data_workers() -> None:
    """Kill the data workers at the end of the process.

    Megatron makes them ignore SIGTERM. When a rank fails, multiprocessing would send it to them and wait forever, and
    all other ranks would wait for this one.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error for each killed worker
    for worker in multiprocessing.active_children():
        worker.kill()
