"""Ranks the checkpoints of a run by their validation KL, in ``best_checkpoints.json`` next to the checkpoints.

``--qad-keep-best`` and the exporter's ``--iteration best`` use this ranking. A resumed job keeps the entries up to its
checkpoint. Only validations on the same held-out tokens as the newest one are ranked, because on other text another
checkpoint may be the best.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.training import is_last_rank, print_rank_0

from megatron_qad.engine.events import Callback
from megatron_qad.engine.run_directory import json_records
from megatron_qad.engine.run_directory.iterations import BEST_KEY, validations
from megatron_qad.engine.run_directory.run_files import BEST_FILE

Tokens = tuple[int | None, str | None]
"""Number of counted tokens of a validation, and a hash of the held-out samples (``ValidationSet.sha256``)."""


class BestCheckpoints(Callback):
    """Records the KL to the teacher by iteration, with the same values on every rank, once the job has begun."""

    def __init__(self, job):
        self._job = job
        self._root: Path | None = None
        self._kl: dict[int, float] = {}
        self._tokens: Tokens = (None, None)
        """Tokens on which each KL was measured."""

    def job_begins(self, job, resumes_at: int) -> None:
        save, load = self._job.args.save, self._job.args.load
        if save is not None:
            is_same = load is not None and Path(load).resolve() == Path(save).resolve()
            self.start(Path(save), resumes_at if is_same else 0)

    def evaluation_ended(self, iteration: int, means: dict[str, float]) -> None:
        tokens = means["num_tokens"], self._job.datasets_provider.validation_sha256
        self.add(iteration, means.get(BEST_KEY) if is_last_rank() else None, tokens)

    def start(self, root: Path, iteration: int) -> None:
        """Read the ranking in ``root`` up to the checkpoint of ``iteration``; 0 starts a new ranking."""
        self._root = root
        entries = [entry for entry in validations(root) if entry["iteration"] <= iteration]
        self._kl = {entry["iteration"]: entry[BEST_KEY] for entry in entries}
        self._tokens = (entries[0].get("num_tokens"), entries[0].get("tokens_sha256")) if entries else (None, None)

    def add(self, iteration: int, kl: float | None, tokens: Tokens) -> None:
        """Add the result of a validation; one without counted tokens is ignored. Collective.

        The values of the last rank are used, which computes the loss.
        """
        if self._root is None:
            return
        value = [kl, tokens]
        torch.distributed.broadcast_object_list(value, src=torch.distributed.get_world_size() - 1)
        kl, tokens = value
        num_tokens, sha256 = tokens
        if kl is None or not num_tokens:
            return
        if self._kl and tokens != self._tokens:
            older, (older_tokens, older_sha256) = ", ".join(map(str, sorted(self._kl))), self._tokens
            difference = older_tokens or "an unknown number of"
            if older_tokens == num_tokens:
                difference = "unknown tokens" if older_sha256 is None else f"{num_tokens} others"
            print_rank_0(
                f"megatron_qad: {BEST_FILE}: iteration {iteration} was validated on {num_tokens} tokens, {older} on "
                f"{difference}. Their KLs are not comparable, and the older ones are no longer ranked"
            )
            self._kl.clear()
        self._tokens = tokens
        # The end of training may validate an iteration again, on the same tokens with the same weights.
        if iteration not in self._kl:
            before = min(self._kl.values(), default=None)
            self._kl[iteration] = kl if math.isfinite(kl) else math.inf  # NaN cannot be sorted
            if math.isfinite(kl) and (before is None or kl < before):
                compared = "" if before is None else f" (before {before:.6g})"
                print_rank_0(f"megatron_qad: new best: iteration {iteration}, KL {kl:.6g}{compared}")
        if torch.distributed.get_rank() == 0:
            entries = [
                {"iteration": step, BEST_KEY: self._kl[step], "num_tokens": num_tokens, "tokens_sha256": sha256}
                for step in self.ranked(list(self._kl))
            ]
            json_records.write_or_warn(self._root / BEST_FILE, entries)  # after a failure, the next call writes all

    def ranked(self, iterations: Sequence[int]) -> list[int]:
        """Return those of ``iterations`` that were validated, best first; of equal ones the earlier first."""
        return sorted((step for step in iterations if step in self._kl), key=lambda step: (self._kl[step], step))
