"""What the tiny examples read of a finished run: its divergences from the teacher on held-out text; its export's."""

import json
from pathlib import Path

import torch

from megatron_qad.engine import init_runtime

init_runtime()

from megatron.core.datasets.indexed_dataset import IndexedDataset  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

WINDOW = 256


def measured_kl(run: Path) -> dict[str, float]:
    """KL to the teacher of PTQ, QAT and QAD as their jobs measured it; printed."""
    results = json.loads((run / "report" / "results.json").read_text())["runs"]
    kl = {name: results[name]["validation"]["kl_to_teacher"] for name in ("PTQ", "QAT", "QAD")}
    print(f"        held-out KL to the teacher: {', '.join(f'{name} {value:.5f}' for name, value in kl.items())}")
    return kl


@torch.inference_mode()
def divergence_of_export(run: Path, student: str, dtype: torch.dtype, num_windows: int | None = None) -> float:
    """Mean KL(teacher || exported student) a token over the first held-out windows (None: all), both run by
    transformers on the CPU.

    Args:
        student: the directory of its export in ``run``; the teacher's is ``hf-teacher``.
    """
    data = IndexedDataset(str(run / "data" / "heldout"))
    tokens = torch.cat([torch.from_numpy(data[i].astype("int64")) for i in range(len(data))])
    tokens = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)[:num_windows]
    models = (AutoModelForCausalLM.from_pretrained(run / name, dtype=dtype) for name in ("hf-teacher", student))
    log_p, log_q = (model(tokens, use_cache=False).logits.float().log_softmax(dim=-1) for model in models)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean().item()
