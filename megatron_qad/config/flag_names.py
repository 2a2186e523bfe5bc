"""What to write instead of a flag that does not exist: its new name, its name in Megatron, or the most similar flag."""

import difflib
from collections.abc import Collection

RENAMED = {
    "qad-rule": "qad-policy-override",
    "qad-output-layer": "qad-fused-linear-loss",
    "qad-teacher-on-host": "qad-teacher-cpu-offload",
    "qad-document-multiple": "qad-pad-documents-to",
    "qad-hang-seconds": "qad-hang-timeout",
}
"""Flags of version 0.1 and their names now (CHANGELOG.md)."""
REMOVED = {
    "reset-position-ids": "dataloader-inter-document-masking",
    "reset-attention-mask": "dataloader-inter-document-masking",
    "batch-size": "micro-batch-size",
    "warmup": "lr-warmup-fraction",
    "model-parallel-size": "tensor-model-parallel-size",
    "checkpoint-activations": "recompute-activations",
    "no-position-embedding": "position-embedding-type",
}
"""Flags that Megatron's parser still knows, but that do nothing here, and the flags that replace them."""
_ELSEWHERE = {
    "learning-rate": "lr",
    "max-lr": "lr",
    "warmup-steps": "lr-warmup-iters",
    "warmup-iters": "lr-warmup-iters",
    "warmup-ratio": "lr-warmup-fraction",
    "lr-scheduler-type": "lr-decay-style",
    "max-steps": "train-iters",
    "num-steps": "train-iters",
    "steps": "train-iters",
    "iterations": "train-iters",
    "epoch": "train-iters",
    "epochs": "train-iters",
    "num-train-epochs": "train-iters",
    "gbs": "global-batch-size",
    "train-batch-size": "global-batch-size",
    "gradient-accumulation-steps": "global-batch-size",
    "mbs": "micro-batch-size",
    "per-device-train-batch-size": "micro-batch-size",
    "max-length": "seq-length",
    "max-seq-length": "seq-length",
    "max-grad-norm": "clip-grad",
    "output": "save",
    "output-dir": "save",
    "save-steps": "save-interval",
    "eval-steps": "eval-interval",
    "logging-steps": "log-interval",
    "resume-from-checkpoint": "load",
    "data": "data-path",
    "dataset": "data-path",
    "train-data": "train-data-path",
    "model": "qad-teacher",
    "hf-model": "qad-teacher",
    "tp": "tensor-model-parallel-size",
    "tensor-parallel": "tensor-model-parallel-size",
    "tensor-parallel-size": "tensor-model-parallel-size",
    "pp": "pipeline-model-parallel-size",
    "pipeline-parallel": "pipeline-model-parallel-size",
    "pipeline-parallel-size": "pipeline-model-parallel-size",
    "cp": "context-parallel-size",
    "context-parallel": "context-parallel-size",
    "ep": "expert-model-parallel-size",
    "expert-parallel": "expert-model-parallel-size",
    "expert-parallel-size": "expert-model-parallel-size",
}
"""Names that other training programs give to flags."""
_PREFIX = "qad-"


def advice(name: str, valid: Collection[str], prefix: str = "") -> str:
    """Return the end of an error about an unknown flag; empty if no valid flag is similar.

        >>> advice("qad-hang-seconds", {"qad-hang-timeout"}, "--")
        "its new name is '--qad-hang-timeout'."
        >>> advice("teacher", {"qad-teacher", "test-mode"})
        "did you mean 'qad-teacher'?"

    Args:
        name: the name without ``--``, with ``-`` or ``_``.
        valid: the valid names.
        prefix: what the answer writes before a name.
    """
    key = name.replace("_", "-").lower()
    if RENAMED.get(key) in valid:
        return f"its new name is '{prefix}{RENAMED[key]}'."
    similar = most_similar(key, valid)
    return f"did you mean '{prefix}{similar}'?" if similar else ""


def most_similar(key: str, valid: Collection[str]) -> str | None:
    """Return the valid name that ``key``, a name with ``-``, stands for; None if nothing is similar."""
    names = {name.replace("_", "-"): name for name in sorted(valid) if name.replace("_", "-") not in REMOVED}
    without_prefix = key.removeprefix(_PREFIX)
    for candidate in (_ELSEWHERE.get(key), key, f"{_PREFIX}{key}", without_prefix, f"no-{key}"):
        if candidate in names:
            return names[candidate]
    # Our flags are compared without their prefix, which would make every one of them similar to each other.
    ours = {name.removeprefix(_PREFIX): name for name in names if name.startswith(_PREFIX)}
    candidates = list(ours) if key.startswith(_PREFIX) else [*names, *ours]
    old_names = {old.removeprefix(_PREFIX): new for old, new in RENAMED.items() if new in names}
    near = _nearest(without_prefix, [*candidates, *old_names]) or _nearest(key, [*names])
    if near is None:
        return None
    return names[old_names.get(near) or (ours.get(near, near) if near in candidates else near)]


def _nearest(key: str, candidates: Collection[str]) -> str | None:
    """Return the candidate of which ``key`` is a typo, or that has all its words, or that is the most similar."""
    similar = difflib.get_close_matches(key, candidates, n=1)
    words = set(key.split("-"))
    containing = [name for name in candidates if words <= set(name.split("-"))]
    is_typo = similar and difflib.SequenceMatcher(None, key, similar[0]).ratio() >= (0.9 if len(words) > 1 else 0.75)
    if containing and not is_typo:
        return min(containing, key=lambda name: (len(name.split("-")), name))
    return similar[0] if similar else None
