"""The validations of a run, best first, in a file beside its checkpoints (``best_checkpoints.json``): what
``--qad-keep-best`` and the exporter's ``--iteration best`` go by. It survives a resume: what the resumed run has not
reached again is left out. Only validations on as many tokens as the newest one are ranked: on other text another
checkpoint may be the best."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.training import is_last_rank, print_rank_0

from megatron_qad.engine.events import Callback
from megatron_qad.engine.run_directory import json_records
from megatron_qad.engine.run_directory.iterations import BEST_KEY, validations
from megatron_qad.engine.run_directory.run_files import BEST_FILE


class BestCheckpoints(Callback):
    """KL to the teacher by iteration, the same on every rank. Nothing is kept before the job begins."""

    def __init__(self, job):
        self._job = job
        self._root: Path | None = None
        self._kl: dict[int, float] = {}
        self._num_tokens: int | None = None
        """Tokens that each of them was measured on."""

    def job_begins(self, job, resumes_at: int) -> None:
        save, load = self._job.args.save, self._job.args.load
        if save is not None:
            is_same = load is not None and Path(load).resolve() == Path(save).resolve()
            self.start(Path(save), resumes_at if is_same else 0)

    def evaluation_ended(self, iteration: int, means: dict[str, float]) -> None:
        self.add(iteration, means.get(BEST_KEY) if is_last_rank() else None, means["num_tokens"])

    def start(self, root: Path, iteration: int) -> None:
        """Go on with the list in ``root``, at the checkpoint of ``iteration``; 0 for a run from the beginning."""
        self._root = root
        entries = [entry for entry in validations(root) if entry["iteration"] <= iteration]
        self._kl = {entry["iteration"]: entry[BEST_KEY] for entry in entries}
        self._num_tokens = entries[0].get("num_tokens") if entries else None

    def add(self, iteration: int, kl: float | None, num_tokens: int) -> None:
        """A validation on ``num_tokens`` has ended. Every rank calls this; the last one, which computes the loss, knows
        both. One in which no token counted is no validation."""
        if self._root is None:
            return
        value = [kl, num_tokens]
        torch.distributed.broadcast_object_list(value, src=torch.distributed.get_world_size() - 1)
        kl, num_tokens = value
        if kl is None or not num_tokens:
            return
        if self._kl and num_tokens != self._num_tokens:
            left_out, before = ", ".join(map(str, sorted(self._kl))), self._num_tokens or "an unknown number of"
            print_rank_0(
                f"megatron_qad: {BEST_FILE}: iteration {iteration} was validated on {num_tokens} tokens, {left_out} on "
                f"{before}: they do not compare, and the older ones are no longer ranked"
            )
            self._kl.clear()
        self._num_tokens = num_tokens
        # A second one, at the end of training, reads the same tokens with the same weights.
        self._kl.setdefault(iteration, kl if math.isfinite(kl) else math.inf)  # NaN has no place in an order
        if torch.distributed.get_rank() == 0:
            entries = [
                {"iteration": step, BEST_KEY: self._kl[step], "num_tokens": num_tokens}
                for step in self.ranked(list(self._kl))
            ]
            json_records.write_or_warn(self._root / BEST_FILE, entries)  # or the next time

    def ranked(self, iterations: Sequence[int]) -> list[int]:
        """Those of ``iterations`` that were validated, best first; the earlier of equals."""
        return sorted((step for step in iterations if step in self._kl), key=lambda step: (self._kl[step], step))
