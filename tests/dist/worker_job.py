"""Lets a worker process run several jobs in turn, each with a different parallelism.

Import it first and inside ``cases``: importing it initializes the runtime, which takes seconds.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_qad.engine import init_runtime

init_runtime()

import docstrings  # noqa: E402
from megatron.core import mpu  # noqa: E402
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator  # noqa: E402
from megatron.core.rerun_state_machine import destroy_rerun_state_machine  # noqa: E402
from megatron.training import initialize_megatron  # noqa: E402
from megatron.training.global_vars import destroy_global_vars  # noqa: E402

from megatron_qad.training.job import QADJob  # noqa: E402
from megatron_qad.training.start import read_command_line, start_job  # noqa: E402

docstrings.read_once()


@contextmanager
def job(checkpoint: str, tp: int = 1, pp: int = 1, *flags: str) -> Iterator[QADJob]:
    """Context manager that starts a job as ``pretrain_qad.py`` does, with ``checkpoint`` as the teacher.

    The models are not built yet. Model-parallel groups, global arguments and RNG states are recreated for each job;
    torch.distributed is not.
    """
    argv = ["--qad-teacher", checkpoint, "--tensor-model-parallel-size", str(tp)]
    argv += ["--pipeline-model-parallel-size", str(pp), "--mock-data", "--train-iters", "1", "--lr", "1e-3"]
    sys.argv = ["worker"]
    started = start_job(read_command_line([*argv, *flags]))
    initialize_megatron()
    try:
        yield started
    finally:
        mpu.destroy_model_parallel()
        destroy_rerun_state_machine()
        destroy_num_microbatches_calculator()
        destroy_global_vars()
