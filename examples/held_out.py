"""KL to the teacher on held-out text, of the runs and of the export of a tiny example."""

import json
from pathlib import Path

import torch

from megatron_qad.engine import init_runtime

init_runtime()

from megatron.core.datasets.indexed_dataset import IndexedDataset  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

WINDOW = 256


def measured_kl(run: Path) -> dict[str, float]:
    """Return the KL to the teacher of PTQ, QAT and QAD, as measured by their jobs."""
    results = json.loads((run / "report" / "results.json").read_text())["runs"]
    return {name: results[name]["validation"]["kl_to_teacher"] for name in ("PTQ", "QAT", "QAD")}


@torch.inference_mode()
def divergence_of_export(run: Path, student: str, dtype: torch.dtype, num_windows: int | None = None) -> float:
    """Return the mean KL(teacher || exported student) per token on held-out text, with transformers on the CPU.

    Args:
        student: directory of the exported student in ``run``; that of the teacher is ``hf-teacher``.
        num_windows: number of held-out windows to use; None uses all.
    """
    data = IndexedDataset(str(run / "data" / "heldout"))
    tokens = torch.cat([torch.from_numpy(data[i].astype("int64")) for i in range(len(data))])
    tokens = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)[:num_windows]
    models = (AutoModelForCausalLM.from_pretrained(run / name, dtype=dtype) for name in ("hf-teacher", student))
    log_p, log_q = (model(tokens, use_cache=False).logits.float().log_softmax(dim=-1) for model in models)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean().item()
