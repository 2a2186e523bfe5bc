"""A resumable version of torch's AdamW, for machines without FusedAdam from Transformer Engine or apex.

Megatron's distributed optimizer does not work with torch's AdamW for two reasons. It reads the state before the first
step, to know what to load from a checkpoint, but torch creates it at the first step. And it restores the step counter
into the parameter groups, where FusedAdam keeps it, and overwrites torch's counters, one tensor for each parameter,
with their values from before loading.
"""

import torch

from megatron_qad.engine.patches import replace


class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` with a state from the start and step counters that follow those of restored groups.

    On a CPU it uses torch's fused form, with one pass over the state instead of eight. On a GPU it uses torch's
    default, because the fused form requires the step counters on the GPU.
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
        for group in self.param_groups:  # at every step, because a restored group has the previous job's setting
            on_cpu = all(param.device.type == "cpu" for param in group["params"])
            group["fused"] = True if on_cpu else None
        return super().step(closure)

    def _take_restored_step(self) -> None:
        for group in self.param_groups:
            step = group.pop("step", None)
            if step is not None:
                for param in group["params"]:
                    # A new tensor for each parameter: Megatron gives all the same one, which each would then advance.
                    self.state[param]["step"] = torch.tensor(float(step), dtype=torch.float32)


def install() -> None:
    """Replace ``torch.optim.AdamW``, which Megatron uses, with this class."""
    replace("torch.optim:AdamW", lambda _: AdamW)
