"""What a step of teacher and student costs under a pipeline schedule, before it is built or rented.

    python tools/simulate_schedule.py --pp 4 --microbatches 16 [--virtual 2] [--forward 1 --backward 2 --teacher 1]
        [--p2p 0.05] [--kept-mb 100] [--png schedule.png]

Costs are times of one microbatch on one rank (all its virtual stages), in any unit. Three ways to run the teacher:
``first`` is this project's (the teacher's own forward-only pipeline, then the student's, no barrier between them),
``inside`` runs it in every forward pass of the student's (modelopt's way; twice the bytes between stages), ``filled``
puts the teacher's pass for the next step into the idle times of this one, and what does not fit behind it. ``bound`` is
what no way of filling can beat: the busiest rank's work. Left out: optimizer, data-parallel communication, imbalance.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

WAYS = ("first", "inside", "filled")


@dataclass(frozen=True)
class Costs:
    """Of one microbatch on one rank."""

    forward: float = 1.0
    backward: float = 2.0
    teacher: float = 1.0
    p2p: float = 0.0
    """Of one hidden state between neighbours; the receiver waits for it, the sender does not."""


@dataclass(frozen=True)
class Op:
    kind: str
    """"T", "F" or "B"."""
    microbatch: int
    stage: int
    """Global: chunk * ranks + rank."""


@dataclass
class Timeline:
    """What every rank does and when."""

    ranks: list[list[tuple[Op, float, float]]] = field(default_factory=list)

    @property
    def time(self) -> float:
        return max(end for ops in self.ranks for _, _, end in ops)

    @property
    def bubble(self) -> float:
        """Share of the ranks' time in which they do nothing."""
        busy = sum(end - start for ops in self.ranks for _, start, end in ops)
        return 1 - busy / (self.time * len(self.ranks))

    def peak_kept(self, num_chunks: int = 1) -> float:
        """Largest number of microbatches whose activations a rank keeps, in units of a rank's whole share."""
        peak = 0
        for ops in self.ranks:
            kept = 0
            for op, _, _ in ops:
                kept += {"F": 1, "B": -1, "T": 0}[op.kind]
                peak = max(peak, kept)
        return peak / num_chunks


def student_order(rank: int, ranks: int, chunks: int, microbatches: int) -> list[Op]:
    """The order of one rank's student passes: Megatron's 1F1B, interleaved where there are virtual stages."""
    total = microbatches * chunks

    def nth(kind: str, i: int) -> Op:
        group, place = divmod(i, ranks * chunks)
        chunk = place // ranks
        chunk = chunk if kind == "F" else chunks - 1 - chunk
        return Op(kind, group * ranks + place % ranks, chunk * ranks + rank)

    warm_up = ranks - 1 - rank
    if chunks > 1:
        warm_up = 2 * warm_up + (chunks - 1) * ranks
    warm_up = min(warm_up, total)
    order = [nth("F", i) for i in range(warm_up)]
    for i in range(total - warm_up):
        order += [nth("F", warm_up + i), nth("B", i)]
    return order + [nth("B", i) for i in range(total - warm_up, total)]


def teacher_order(rank: int, ranks: int, chunks: int, microbatches: int) -> list[Op]:
    """Megatron's forward-only schedule: rounds of ``ranks`` microbatches, chunk after chunk."""
    rounds = range(0, microbatches, ranks) if chunks > 1 else [0]
    size = ranks if chunks > 1 else microbatches
    return [
        Op("T", first + i, chunk * ranks + rank)
        for first in rounds
        for chunk in range(chunks)
        for i in range(min(size, microbatches - first))
    ]


def simulate(way: str, ranks: int, chunks: int, microbatches: int, costs: Costs | list[Costs]) -> Timeline:
    """One step. Interleaved schedules need a number of microbatches that ``ranks`` divides.

    Args:
        costs: of every rank, or of each; ``p2p`` is the first's.
    """
    costs = [costs] * ranks if isinstance(costs, Costs) else costs
    if chunks > 1 and microbatches % ranks:
        raise ValueError(f"{microbatches} microbatches are no multiple of {ranks} ranks, which virtual stages need")
    durations = [{"F": c.forward / chunks, "B": c.backward / chunks, "T": c.teacher / chunks} for c in costs]
    p2p = costs[0].p2p
    orders = [student_order(r, ranks, chunks, microbatches) for r in range(ranks)]
    teacher = [teacher_order(r, ranks, chunks, microbatches) for r in range(ranks)]
    if way == "inside":
        durations = [own | {"F": own["F"] + own["T"]} for own in durations]
        p2p *= 2
    if way == "first":
        orders = [a + b for a, b in zip(teacher, orders, strict=True)]
    timeline = _run(orders, durations, p2p, ranks * chunks)
    if way == "filled":
        return _fill(timeline, teacher, [own["T"] for own in durations], p2p, ranks * chunks)
    return timeline


def _needs(op: Op, last: int) -> list[tuple[Op, bool]]:
    """What must be done before, and whether it comes from another rank."""
    if op.kind in "FT":
        return [(Op(op.kind, op.microbatch, op.stage - 1), True)] if op.stage else []
    if op.stage == last:
        return [(Op("F", op.microbatch, op.stage), False)]
    return [(Op("B", op.microbatch, op.stage + 1), True), (Op("F", op.microbatch, op.stage), False)]


def _run(orders: list[list[Op]], durations: list[dict[str, float]], p2p: float, num_stages: int) -> Timeline:
    done: dict[Op, float] = {}
    timeline = Timeline([[] for _ in orders])
    next_op, free = [0] * len(orders), [0.0] * len(orders)
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while next_op[rank] < len(order):
                op = order[next_op[rank]]
                needs = _needs(op, num_stages - 1)
                if any(need not in done for need, _ in needs):
                    break
                start = max([free[rank], *(done[need] + p2p * (far and len(orders) > 1) for need, far in needs)])
                free[rank] = done[op] = start + durations[rank][op.kind]
                timeline.ranks[rank].append((op, start, free[rank]))
                next_op[rank] += 1
                moved = True
    stuck = [order[i] for order, i in zip(orders, next_op, strict=True) if i < len(order)]
    if stuck:
        raise AssertionError(f"the schedule never reaches {stuck[0]}")
    return timeline


def _fill(timeline: Timeline, teacher: list[list[Op]], durations: list[float], p2p: float, num_stages: int) -> Timeline:
    """Put the teacher's passes into the gaps, each as early as what it needs allows, without moving the student's."""
    busy = [list(ops) for ops in timeline.ranks]
    done: dict[Op, float] = {}
    todo = sorted((op for order in teacher for op in order), key=lambda op: (op.stage, op.microbatch))
    for op in todo:
        rank = op.stage % len(teacher)
        ready = max([0.0, *(done[need] + p2p for need, _ in _needs(op, num_stages - 1))])
        start = ready
        for _, begin, end in busy[rank]:  # in order of time
            if start + durations[rank] <= begin + 1e-9:
                break
            start = max(start, end)
        done[op] = start + durations[rank]
        busy[rank].append((op, start, done[op]))
        busy[rank].sort(key=lambda item: item[1])
    return Timeline(busy)


def bound(ranks: int, chunks: int, microbatches: int, costs: Costs) -> float:
    """No filling can be faster: the student's own schedule, or a rank's work."""
    alone = simulate("filled", ranks, chunks, microbatches, Costs(costs.forward, costs.backward, 0.0, costs.p2p)).time
    return max(alone, microbatches * (costs.forward + costs.backward + costs.teacher))


def draw(timelines: dict[str, Timeline], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = {"T": "#b8a9c9", "F": "#7fb3d5", "B": "#f0b27a"}
    figure, axes = plt.subplots(len(timelines), sharex=True, figsize=(14, 2.2 * len(timelines)), squeeze=False)
    for axis, (way, timeline) in zip(axes[:, 0], timelines.items(), strict=True):
        for rank, ops in enumerate(timeline.ranks):
            for op, start, end in ops:
                axis.barh(-rank, end - start, left=start, color=colors[op.kind], edgecolor="white", linewidth=0.4)
        axis.set_yticks([-rank for rank in range(len(timeline.ranks))], [str(r) for r in range(len(timeline.ranks))])
        axis.set_title(f"teacher {way}: {timeline.time:.1f}, {timeline.bubble:.0%} idle", loc="left", fontsize=9)
        axis.set_ylabel("rank")
    axes[-1, 0].set_xlabel("time; violet: teacher, blue: forward, orange: backward")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pp", type=int, default=4, help="pipeline ranks")
    parser.add_argument("--virtual", type=int, default=1, help="virtual stages a rank")
    parser.add_argument("--microbatches", type=int, default=8)
    for name, cost in (("forward", 1.0), ("backward", 2.0), ("teacher", 1.0), ("p2p", 0.0)):
        parser.add_argument(f"--{name}", type=float, default=cost)
    parser.add_argument("--kept-mb", type=float, default=1.0, help="activations of one microbatch on one rank, in MB")
    parser.add_argument("--png", type=Path)
    args = parser.parse_args()
    costs = Costs(args.forward, args.backward, args.teacher, args.p2p)
    shape = (args.pp, args.virtual, args.microbatches)
    timelines = {way: simulate(way, *shape, costs) for way in WAYS}
    print("| teacher | step | idle | kept at most, MB |\n|---|---|---|---|")
    for way, timeline in timelines.items():
        kept = timeline.peak_kept(args.virtual) * args.kept_mb
        print(f"| {way} | {timeline.time:.2f} | {timeline.bubble:.1%} | {kept:.1f} |")
    least = bound(*shape, costs)
    first = timelines["first"].time
    print(f"| bound | {least:.2f} | | |")
    print(f"filling saves {1 - timelines['filled'].time / first:.1%} of a step; at most {1 - least / first:.1%}")
    if args.png:
        draw(timelines, args.png)


if __name__ == "__main__":
    main()
