"""pretrain_qad.py with a callback that raises in the third step."""

import pretrain_qad
from megatron_qad.engine.events import Callback


class Crash(Callback):
    def __init__(self):
        self._num_steps = 0

    def step_begins(self, step, model):
        self._num_steps += 1
        if self._num_steps == 3:
            raise RuntimeError("the third step")


if __name__ == "__main__":
    pretrain_qad.main(callbacks=[Crash()])
