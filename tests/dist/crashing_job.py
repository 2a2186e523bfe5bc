"""pretrain_qad.py with a bug that shows itself in the third step."""

import pretrain_qad  # noqa: I001  before megatron: it installs the backend
from megatron.training import training as megatron_loop

train_step, num_steps = megatron_loop.train_step, 0


def crash(*args, **kwargs):
    global num_steps
    num_steps += 1
    if num_steps == 3:
        raise RuntimeError("the third step")
    return train_step(*args, **kwargs)


megatron_loop.train_step = crash
if __name__ == "__main__":
    pretrain_qad.main()
