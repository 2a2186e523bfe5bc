"""For workers: one process, several jobs one after the other, each in a parallel layout of its own.

Import it inside ``cases`` and first there: importing it prepares the machine, which takes seconds.
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
    """A job as ``pretrain_qad.py`` starts it for ``checkpoint`` as the teacher, before it builds its models.

    Model-parallel groups, global arguments and random state are made anew; torch.distributed stays.
    """
    argv = ["--qad-teacher", checkpoint, "--tensor-model-parallel-size", str(tp)]
    argv += ["--pipeline-model-parallel-size", str(pp), "--mock-data", "--train-iters", "1", "--lr", "1e-3"]
    sys.argv = ["worker"]
    found = start_job(read_command_line([*argv, *flags]))
    initialize_megatron()
    try:
        yield found
    finally:
        mpu.destroy_model_parallel()
        destroy_rerun_state_machine()
        destroy_num_microbatches_calculator()
        destroy_global_vars()
