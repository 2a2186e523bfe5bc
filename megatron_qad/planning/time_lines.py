"""Text about an estimated step time, for the dry run and the planner."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_qad.engine.chips import BF16_PEAKS
from megatron_qad.planning.layout import Layout
from megatron_qad.planning.step_time import Machine, StepTime, StepTimes


@dataclass(frozen=True)
class Chip:
    """A GPU that is assumed where none is known."""

    name: str
    """Key of ``BF16_PEAKS``."""

    @property
    def peak(self) -> float:
        """Peak of dense BF16 products, FLOP/s."""
        return BF16_PEAKS[self.name]


DEFAULT_CHIP = Chip("H100")


def describe_machine(chip: Chip, machine: Machine) -> str:
    """Return the assumptions of an estimate in one line."""
    return (
        f"{chip.name} with {machine.peak / 1e12:g} TFLOP/s of dense BF16, MFU {machine.mfu:.0%}, "
        f"{machine.gpus_per_node} GPUs a node, {machine.node_bandwidth / 1e9:g} GB/s in a node, "
        f"{machine.network_bandwidth / 1e9:g} GB/s between nodes"
    )


def phases(time: StepTime) -> str:
    """Return the seconds of each phase that takes time."""
    named = ((name.replace("_", " "), seconds) for name, seconds in vars(time).items())
    return ", ".join(f"{name} {seconds:.3g}" for name, seconds in named if seconds > 0)


def time_lines(times: StepTimes, layout: Layout, num_tokens: int, chip: Chip = DEFAULT_CHIP) -> Iterator[str]:
    """Yield lines about the time of a step, and of a training on ``num_tokens`` tokens."""
    time = times.of(layout)
    rate = layout.global_batch_size * layout.seq_length / time.total
    hours = num_tokens / rate / 3600
    yield (
        f"time        {time.total:.3g} s a step, {rate:,.0f} tokens/s; the training {hours:,.2f} hours, "
        f"{hours * layout.world_size:,.1f} GPU-hours (estimated, not measured)"
    )
    yield f"            seconds: {phases(time)}"
    yield f"            assumed: {describe_machine(chip, times.machine)}"
