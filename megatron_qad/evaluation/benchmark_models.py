"""The model of a benchmark: a local directory in transformers, or an OpenAI-compatible server, as lm-eval's model.

Sampling is by temperature and top-p alone. Other limits of a model's generation_config.json, such as top-k or a
repetition penalty, are switched off, because they would change the distribution.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_qad.data.generation_identity import model_files
from megatron_qad.data.local_generation import load_model
from megatron_qad.data.openai_server import find_server
from megatron_qad.engine.cpu.speedups import bf16_matmul_fallback
from megatron_qad.engine.errors import QADError
from megatron_qad.evaluation.benchmark_tasks import harness


@dataclass(frozen=True)
class BenchmarkModel:
    """A model that answers. ``open`` loads it or finds its server."""

    lm: Any
    """lm-eval's object."""
    identity: dict[str, Any]
    """What tells it apart from other models. A run is resumed only with the same."""
    chat: bool
    neutral: dict[str, Any]
    """Generation arguments that switch off other limits."""
    seeded: bool = field(default=False)
    """Whether each request carries the seed of its run (``use_seed``)."""

    def use_seed(self, seed: int) -> None:
        """Use a seed for the samples of the next run."""
        torch.manual_seed(seed)
        if self.seeded:
            self.lm.run_seed = seed


def open_directory(model: Path, *, chat: bool, batch_size: int, dtype: str, device: str) -> BenchmarkModel:
    """Load a Hugging Face directory with transformers.

    Raises:
        QADError: no lm-eval, or transformers cannot load the directory.
    """
    harness()
    if torch.device(device).type == "cpu":
        bf16_matmul_fallback.install()
    loaded, tokenizer = load_model(model, dtype, device)
    if chat and not tokenizer.chat_template:
        raise QADError(f"--chat: {model} has no chat template. Omit --chat.")
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=batch_size, device=device)
    return BenchmarkModel(lm, {"files": model_files(model), "dtype": dtype}, chat, {"top_k": 0})


def open_server(
    url: str, name: str | None, *, chat: bool, tokenizer: Path | None, fields: dict[str, Any], num_concurrent: int
) -> BenchmarkModel:
    """Find the model of an OpenAI-compatible server.

    Args:
        url: address up to and including ``/v1``.
        name: name of the model at the server; None if it serves one.
        tokenizer: directory of the tokenizer. Tasks that compare log-probabilities need it.
        fields: additional fields of every request.

    Raises:
        QADError: no lm-eval, or as ``find_server``.
    """
    harness()
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    server = find_server(url, name)
    base = LocalChatCompletion if chat else LocalCompletionsAPI

    class Seeded(base):
        """Gives each request a seed of its own: with one seed for all, the problems of a run would share their luck."""

        run_seed = 0

        def _create_payload(self, messages, generate=False, gen_kwargs=None, seed=0, **kwargs):
            text = json.dumps([self.run_seed, messages])
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1  # 31 bits
            return super()._create_payload(messages, generate=generate, gen_kwargs=gen_kwargs, seed=seed, **kwargs)

    more: dict[str, Any] = {"tokenizer_backend": "none", "tokenized_requests": False}
    if not chat and tokenizer is not None:
        more = {"tokenizer_backend": "huggingface", "tokenizer": str(tokenizer), "tokenized_requests": True}
    lm = Seeded(
        base_url=f"{url.rstrip('/')}/{'chat/completions' if chat else 'completions'}",
        model=server.model,
        num_concurrent=num_concurrent,
        max_length=1 << 30,  # the server has the limit; lm-eval would cut prompts silently
        timeout=24 * 3600,
        **more,
    )
    return BenchmarkModel(lm, server.identity() | {"fields": fields}, chat, fields, seeded=True)
