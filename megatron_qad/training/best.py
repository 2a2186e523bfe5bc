"""The validations of a run, best first, in a file beside its checkpoints (``best_checkpoints.json``): what
``--qad-keep-best`` and the exporter's ``--iteration best`` go by. It survives a resume: what the resumed run has not
reached again is left out."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_qad.config.run_files import BEST_FILE
from megatron_qad.models.weights import BEST_KEY, validated_kl
from megatron_qad.runtime import json_records


class BestCheckpoints:
    """KL to the teacher by iteration, the same on every rank. Nothing is kept before ``start``."""

    def __init__(self):
        self._root: Path | None = None
        self._kl: dict[int, float] = {}

    def start(self, root: Path, iteration: int) -> None:
        """Go on with the list in ``root``, at the checkpoint of ``iteration``; 0 for a run from the beginning."""
        self._root = root
        self._kl = {step: kl for step, kl in validated_kl(root).items() if step <= iteration}

    def add(self, iteration: int, kl: float | None) -> None:
        """A validation has ended. Every rank calls this; the last one, which computes the loss, knows ``kl``."""
        if self._root is None:
            return
        value = [kl]
        torch.distributed.broadcast_object_list(value, src=torch.distributed.get_world_size() - 1)
        if value[0] is None:
            return
        kl = value[0] if math.isfinite(value[0]) else math.inf  # NaN has no place in an order
        self._kl.setdefault(iteration, kl)  # the one before the save; a last one at the end sees other data
        if torch.distributed.get_rank() == 0:
            entries = [{"iteration": step, BEST_KEY: self._kl[step]} for step in self.ranked(list(self._kl))]
            json_records.write_or_say(self._root / BEST_FILE, entries)  # or the next time

    def ranked(self, iterations: Sequence[int]) -> list[int]:
        """Those of ``iterations`` that were validated, best first; the earlier of equals."""
        return sorted((step for step in iterations if step in self._kl), key=lambda step: (self._kl[step], step))


best_checkpoints = BestCheckpoints()
