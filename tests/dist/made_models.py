"""Models for test_model_parity.py and test_conversion.py, made in four launches for both."""

from dataclasses import dataclass
from pathlib import Path

import tiny_models
import torch
from fork_server import ForkServer
from safetensors.torch import save_file

# name -> (tensor-parallel size, pipeline-parallel size), flags
PARALLELISM = {
    "tp1": ((1, 1), ()),
    "tp2": ((2, 1), ()),
    "tp2-sp": ((2, 1), ("--sequence-parallel",)),
    "pp2": ((1, 2), ()),
    "tp2-pp2": ((2, 2), ("--sequence-parallel",)),
}
# One case per family, tied and untied. Sequence parallelism does not change saved checkpoints.
CONVERTED = ("llama-tied", "llama3-rope", "qwen2", "qwen3-tied")
SAVED = ("tp1", "tp2", "pp2", "tp2-pp2")
# Shard size of exports: smaller than every tiny model, larger than its largest tensor.
SHARD_BYTES = 40_000


@dataclass(frozen=True)
class Made:
    """Directory of the models and the results of the logit comparisons."""

    root: Path
    """Has hf/CASE (BF16, by transformers), ranks1/CASE and ranks2/CASE (imported by one and two processes),
    PARALLELISM/CASE (saved by Megatron), and under out/ the exports of each."""
    logits: list[dict]


def make_models(root: Path, server: ForkServer) -> Made:
    """Save, import, run, save and export every case under ``root``."""
    imports = [_model_with_logits(root, case) for case in tiny_models.CASES]
    for case in CONVERTED:
        tiny_models.make(case, root / "hf" / case, torch.bfloat16)
        imports.append([str(root / "hf" / case), str(root / "ranks1" / case), "bfloat16"])
    imports_by_two = [
        [source, target.replace("ranks1", "ranks2"), dtype] for source, target, dtype in imports[-len(CONVERTED) :]
    ]
    logits: list[dict] = []
    for nproc, to_import in ((1, imports), (2, imports_by_two), (4, [])):
        names = [name for name, ((tp, pp), _) in PARALLELISM.items() if tp * pp == nproc]
        arguments = {
            "imports": to_import,
            "logits": [_logits(root, case, name) for name in names for case in tiny_models.CASES],
            "saves": [_save(root, case, name) for name in names if name in SAVED for case in CONVERTED],
        }
        logits += [r for r in server.results("worker_models", nproc, arguments) if isinstance(r, dict)]
    sources = [f"{name}/{case}" for name in ("ranks1", "ranks2", *SAVED) for case in CONVERTED]
    exports = [[str(root / source), str(root / "out" / source), "bf16", SHARD_BYTES] for source in sources]
    server.results("worker_models", 1, {"exports": exports})
    return Made(root, logits)


def _model_with_logits(root: Path, case: str) -> list[str]:
    """Save the case in float32 with transformers, and its logits. Returns the arguments of its import."""
    model, tokens = tiny_models.make(case, root / "float32" / case), tiny_models.tokens(case, rows=4)
    with torch.no_grad():
        save_file({"tokens": tokens, "logits": model(tokens).logits}, root / f"{case}.safetensors")
    return [str(root / "float32" / case), str(root / "float32-imported" / case), "float32"]


def _logits(root: Path, case: str, parallelism: str) -> dict:
    parallel, flags = PARALLELISM[parallelism]
    expected, checkpoint = str(root / f"{case}.safetensors"), str(root / "float32-imported" / case)
    names = {"case": case, "parallelism": parallelism}
    return {**names, "checkpoint": checkpoint, "expected": expected, "parallel": parallel, "flags": flags}


def _save(root: Path, case: str, parallelism: str) -> dict:
    parallel, flags = PARALLELISM[parallelism]
    checkpoint, target = str(root / "ranks1" / case), str(root / parallelism / case)
    return {"checkpoint": checkpoint, "target": target, "parallel": parallel, "flags": flags}
