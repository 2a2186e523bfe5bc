"""Sampling of documents from a model in this process, with plain transformers.

From BOS alone the model writes documents, ``{"text": ...}``; from prompts it writes the assistant's answers,
``{"messages": [..., assistant]}``. Not supported: several GPUs. A serving engine is much faster
(``server_generation``).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_qad.data.bad_document import failures_are_bad_documents
from megatron_qad.data.generate import GenerateOptions
from megatron_qad.data.generation_identity import model_files, prompts_digest
from megatron_qad.data.prompts import Prompt
from megatron_qad.data.sampling import Sampler
from megatron_qad.engine.cpu.speedups import bf16_matmul_fallback
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.local_models import local_config


class LocalModel:
    """A source of documents (``generate.Source``): a Hugging Face model that transformers loads.

    Each line has ``"finish"``: "eos" if the model ended the text, "length" if ``max_new_tokens`` was reached.

    Args:
        directory: Hugging Face directory of a causal language model with its tokenizer.
        prompts: one per document, rendered with the chat template; None starts from BOS alone.
        options: see ``GenerateOptions``.
        device: torch device of the model.

    Raises:
        QADError: no prompt, or no such directory. ``documents`` raises it for a model that cannot be loaded, and for a
             missing BOS or chat template where one is needed.
    """

    def __init__(
        self,
        directory: str | Path,
        prompts: Sequence[str | Prompt] | None,
        options: GenerateOptions,
        device: str = "cpu",
    ):
        if prompts is not None and not prompts:
            raise QADError("The list of prompts is empty. Give prompts, or None to start from BOS.")
        if not Path(directory).is_dir():
            raise QADError(
                f"--model {directory} is not a directory. Expected a local Hugging Face model; nothing is downloaded."
            )
        self._directory, self._options, self._device = directory, options, device
        self._prompts = None if prompts is None else [Prompt.of(prompt) for prompt in prompts]
        self.batch_size = options.batch_size

    def settings(self) -> dict[str, Any]:
        """Return the sums of the model's files, the digest of the prompts and the sampling options."""
        names = ("max_new_tokens", "batch_size", "temperature", "top_p", "seed", "dtype")
        settings = {"model files": model_files(self._directory), "prompts": prompts_digest(self._prompts)}
        return settings | {name: getattr(self._options, name) for name in names}

    def documents(self, first: int, end: int) -> Iterator[dict[str, Any]]:
        """Yield the lines of documents ``first`` to ``end - 1``; loads the model."""
        options = self._options
        if torch.device(self._device).type == "cpu":
            bf16_matmul_fallback.install()
        model, tokenizer = load_model(self._directory, options.dtype, self._device)
        for start in range(first, end, options.batch_size):
            size = min(options.batch_size, end - start)
            batch = None
            if self._prompts is not None:
                batch = [self._prompts[(start + i) % len(self._prompts)] for i in range(size)]
            torch.manual_seed(options.seed + start // options.batch_size)
            yield from _sample_batch(model, tokenizer, batch, size, options)


def load_model(model_dir: str | Path, dtype: str, device: str):
    """Return (model, tokenizer) of a local directory, without the sampling settings of its generation_config.json.

    Packed weights (``compressed-tensors``) are rounded to BF16 and computed with in ``dtype``.

    Raises:
        QADError: transformers cannot load it, or it would need something from outside of the directory.
    """
    try:
        config = local_config(model_dir)
    except QADError:
        raise
    except Exception as error:  # transformers raises errors of any class for damaged files
        raise _cannot_load(model_dir, error) from error
    is_packed = getattr(config, "quantization_config", None) is not None
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

    from megatron_qad.engine.cpu.speedups.grouped_attention import register
    from megatron_qad.engine.cpu.transformers_mamba import use_own_scan

    # MLP layers of Nemotron-H have no cache, like its expert layers; transformers 5.14 maps only the latter, 5.15 maps
    # both, and 5.24 neither, because its caches handle both types before they read the mapping.
    if "moe" in DYNAMIC_LAYER_TYPE_MAPPING:
        DYNAMIC_LAYER_TYPE_MAPPING.setdefault("mlp", DYNAMIC_LAYER_TYPE_MAPPING["moe"])
    with failures_are_bad_documents(f"--model {model_dir}: transformers cannot load its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True, trust_remote_code=False)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(model_dir),
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,  # other files are pickles, which can run code
            dtype=torch.bfloat16 if is_packed else getattr(torch, dtype),
        )
        model.to(device)
        if is_packed:
            # compressed-tensors decompresses weights in the first forward pass, always to BF16.
            with torch.no_grad():
                model(torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False)
            model.to(getattr(torch, dtype))
        use_own_scan(model)
        if torch.device(device).type == "cpu" and model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(register())
    except Exception as error:  # transformers raises errors of any class for damaged files
        raise _cannot_load(model_dir, error) from error
    # Only the EOS ids of generation_config.json are kept: a repetition penalty would change the model's distribution.
    ends = model.generation_config.eos_token_id
    if ends is not None and not all(type(id_) is int for id_ in (ends if isinstance(ends, list) else [ends])):
        raise QADError(f"--model {model_dir}: eos_token_id is {ends!r:.100}, expected an integer or a list of them.")
    model.generation_config = GenerationConfig(eos_token_id=ends)
    return model.eval(), tokenizer


def _cannot_load(model_dir: str | Path, error: Exception) -> QADError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return QADError(f"--model {model_dir}: transformers cannot load it: {reason:.500}")


def _sample_batch(model, tokenizer, prompts: list[Prompt] | None, size: int, options: GenerateOptions) -> list[dict]:
    """Sample ``size`` JSONL lines; prompts are padded on the left so that all answers start at the same column."""
    from transformers import GenerationConfig, LogitsProcessorList

    from megatron_qad.engine.cpu.speedups.preallocated_kv_cache import preallocated_cache

    end = model.generation_config.eos_token_id
    ends = set(end if isinstance(end, list) else [end]) | {tokenizer.eos_token_id}
    ends.discard(None)
    if not ends:
        raise QADError(
            f"The model {model.name_or_path} has no EOS id, so documents would not end. Set eos_token_id in its config."
        )
    starts = _start_ids(tokenizer, prompts, size)
    width = max(len(ids) for ids in starts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in starts])
    attention = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in starts])
    config = GenerationConfig(
        do_sample=False,  # Sampler draws: it leaves one token per row
        max_new_tokens=options.max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
    )
    with torch.inference_mode():
        sequences = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention.to(model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([Sampler(options.temperature, options.top_p)]),
            past_key_values=preallocated_cache(model.config),
        )
    lines = []
    for i, row in enumerate(sequences[:, width:].tolist()):
        stop = next((place for place, token in enumerate(row) if token in ends), None)
        new_tokens = row if stop is None else row[:stop]
        # A document from BOS keeps its special tokens: the model wrote them, and tokenizing the text restores them. In
        # an answer the chat template adds them.
        text = tokenizer.decode(new_tokens, skip_special_tokens=prompts is not None, clean_up_tokenization_spaces=False)
        line = {"finish": "length" if stop is None else "eos"}
        if prompts is None:
            lines.append({"text": text, **line})
        else:
            turns = [*prompts[i].messages, {"role": "assistant", "content": text}]
            lines.append({**prompts[i].fields, "messages": turns, **line})
    return lines


def _start_ids(tokenizer, prompts: list[Prompt] | None, size: int) -> list[list[int]]:
    if prompts is None:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise QADError(f"{tokenizer.name_or_path} has neither a BOS nor an EOS token to start from. Give prompts.")
        return [[start]] * size
    if not tokenizer.chat_template:
        raise QADError(
            f"{tokenizer.name_or_path} has no chat template for the prompts. Omit the prompts to start from BOS."
        )
    with failures_are_bad_documents(
        f"--prompts: the chat template or the tokenizer of {tokenizer.name_or_path} failed"
    ):
        return [
            list(
                tokenizer.apply_chat_template(
                    prompt.messages, add_generation_prompt=True, tokenize=True, return_dict=True
                )["input_ids"]
            )
            for prompt in prompts
        ]
