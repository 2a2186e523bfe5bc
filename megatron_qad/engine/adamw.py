"""torch's AdamW made resumable, for machines without Transformer Engine's or apex's FusedAdam.

Two things of Megatron's distributed optimizer do not fit torch's: it asks for the state before the first step, to know
what a checkpoint must fill, and torch makes it at the first step; and it restores the step counter into the parameter
groups, where FusedAdam keeps it, and overwrites torch's, which is a tensor a parameter, with the counter from before
loading.
"""

import torch

from megatron_qad.engine.patches import replace


class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` whose state is there from the start and whose step counter follows a restored group's.

    On a CPU it takes torch's fused form, one pass over the state for eight; on a GPU torch's default, since the fused
    form wants the step counters on the GPU.
    """

    def state_dict(self):
        for group in self.param_groups:
            for param in group["params"]:
                if not self.state[param]:
                    self.state[param] = {
                        "step": torch.zeros((), dtype=torch.float32),
                        "exp_avg": torch.zeros_like(param),
                        "exp_avg_sq": torch.zeros_like(param),
                    }
        self._take_restored_step()
        return super().state_dict()

    def step(self, closure=None):
        self._take_restored_step()
        for group in self.param_groups:  # here, not once: a restored group says what the job before it ran on
            on_cpu = all(param.device.type == "cpu" for param in group["params"])
            group["fused"] = True if on_cpu else None
        return super().step(closure)

    def _take_restored_step(self) -> None:
        for group in self.param_groups:
            step = group.pop("step", None)
            if step is not None:
                for param in group["params"]:
                    # A tensor of its own: Megatron gives all parameters the same one, which each would then advance.
                    self.state[param]["step"] = torch.tensor(float(step), dtype=torch.float32)


def install() -> None:
    """Let Megatron, which looks the class up in ``torch.optim``, find this one."""
    replace("torch.optim:AdamW", lambda _: AdamW)
