"""Sampling of training text from the teacher, with plain transformers.

From BOS alone the model writes documents, ``{"text": ...}``; from prompts it writes the assistant's answers,
``{"messages": [user, assistant]}``. Lines are written batch by batch. A restarted run resumes after the last complete
batch and writes the same text as an uninterrupted run. Not supported: several GPUs, serving engines (vLLM is much
faster where it is installed), filtering by correctness.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_qad.data.bad_document import failures_are_bad_documents
from megatron_qad.data.sampling import Sampler
from megatron_qad.engine.cpu.speedups import bf16_matmul_fallback
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.local_models import local_config
from megatron_qad.engine.run_directory import locks, manifest
from megatron_qad.engine.system_errors import naming
from megatron_qad.engine.text_files import read_json


@dataclass(frozen=True)
class GenerateOptions:
    """Sampling options. A resumed run must use the same values, except for ``num_documents``."""

    num_documents: int
    """Number of lines of the finished file. If it exceeds the number of prompts, they are reused with new samples."""
    max_new_tokens: int = 512
    """Maximum length of a document or an answer, in tokens."""
    batch_size: int = 16
    """Number of documents sampled at a time; the output of a seed depends on it."""
    temperature: float = 1.0
    """Sampling temperature, above 0; 1 samples from the model's own distribution."""
    top_p: float = 1.0
    """Probability mass of the most likely tokens to sample from (top-p); 1 disables the limit."""
    seed: int = 1234
    """Random seed; batch b is sampled with seed + b."""
    dtype: str = "bfloat16"
    """dtype of the model: "bfloat16" or "float32"."""


def generate_documents(
    hf_model_dir: str | Path,
    prompts: Sequence[str] | None,
    output: str | Path,
    options: GenerateOptions,
    device: str = "cpu",
) -> int:
    """Sample documents into a JSONL file that ``tools/prepare_data.py`` reads.

    Each line has ``"finish"``: "eos" if the model ended the text, "length" if ``max_new_tokens`` was reached.

    Args:
        hf_model_dir: Hugging Face directory of a causal language model with its tokenizer.
        prompts: user messages, one per document, rendered with the chat template; None starts from BOS alone.
        output: JSONL file. The options are recorded next to it in OUTPUT.settings.json.
        options: see ``GenerateOptions``.
        device: torch device of the model.

    Returns:
        Number of lines written by this call.

    Raises:
        QADError: invalid options, a missing model, a missing BOS or chat template where one is needed, or an output
            that was started with other settings.

    Example::

        options = GenerateOptions(num_documents=2, max_new_tokens=64)
        generate_documents("my_model", ["What is a class?", "And an instance?"], "answers.jsonl", options)  # 2
    """
    _check_options(options, prompts)
    with locks.lock_output(output):
        return _generate(hf_model_dir, prompts, Path(output), options, device)


def _generate(
    hf_model_dir: str | Path, prompts: Sequence[str] | None, output: Path, options: GenerateOptions, device: str
) -> int:
    done = _resume(output, options, hf_model_dir, prompts)
    if done >= options.num_documents:
        return 0
    if torch.device(device).type == "cpu":
        bf16_matmul_fallback.install()
    model, tokenizer = _load(hf_model_dir, options.dtype, device)
    written = 0
    with (
        naming(output),
        output.open("a", encoding="utf-8") as stream,
        tqdm(total=options.num_documents, initial=done, unit="doc", desc="generating", disable=None) as bar,
    ):
        for first in range(done, options.num_documents, options.batch_size):
            size = min(options.batch_size, options.num_documents - first)
            batch = None if prompts is None else [prompts[(first + i) % len(prompts)] for i in range(size)]
            torch.manual_seed(options.seed + first // options.batch_size)
            lines = _sample_batch(model, tokenizer, batch, size, options)
            stream.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            stream.flush()
            written += size
            bar.update(size)
    return written


def read_prompts(path: str | Path) -> list[str]:
    """Read the prompts of a text file, one per line; blank lines are skipped.

    Raises:
        QADError: the file is missing, not UTF-8, or empty.
    """
    try:
        # splitlines() and text mode would also end a line at other characters (U+2028, \x0b, a lone \r).
        lines = Path(path).read_bytes().decode("utf-8").split("\n")
        prompts = [line.strip() for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise QADError(
            f"--prompts {path} cannot be read: {error}. Expected UTF-8 text, one prompt per line."
        ) from error
    if not prompts:
        raise QADError(f"--prompts {path} has no prompt. Expected one prompt per line.")
    return prompts


def _check_options(options: GenerateOptions, prompts: Sequence[str] | None) -> None:
    if prompts is not None and not prompts:
        raise QADError("The list of prompts is empty. Give prompts, or None to start from BOS.")
    if min(options.num_documents, options.max_new_tokens, options.batch_size) < 1:
        raise QADError(f"num_documents, max_new_tokens and batch_size must be at least 1, found {options}.")
    if not (math.isfinite(options.temperature) and options.temperature > 0 and 0 < options.top_p <= 1):
        raise QADError(
            f"temperature must be above 0 and top_p in (0, 1], found {options.temperature}, {options.top_p}."
        )
    if options.dtype not in ("bfloat16", "float32"):
        raise QADError(f"dtype {options.dtype!r} is not 'bfloat16' or 'float32'.")


def _resume(output: Path, options: GenerateOptions, model_dir: str | Path, prompts: Sequence[str] | None) -> int:
    """Truncate the output to complete batches and return its number of lines; write the settings if it is new."""
    settings_path = Path(f"{output}.settings.json")
    settings = {
        "model": str(Path(model_dir).resolve()),
        "prompts": None if prompts is None else _prompts_digest(prompts),
    }
    settings |= {k: v for k, v in asdict(options).items() if k != "num_documents"}  # does not change earlier lines
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_atomically(settings_path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        return 0
    if not settings_path.is_file():
        raise QADError(f"{output} exists without {settings_path.name}, so it cannot be resumed. Choose another file.")
    recorded = read_json(settings_path, "Choose another output file.")
    differing = sorted(k for k in settings.keys() | recorded.keys() if settings.get(k) != recorded.get(k))
    if differing:
        raise QADError(
            f"{output} was started with other settings: {', '.join(differing)} differ from {settings_path.name}. Give "
            "the same settings to resume it, or choose another file."
        )
    lines = output.read_bytes().split(b"\n")[:-1]  # a line after the last newline is incomplete
    complete = len(lines) - len(lines) % options.batch_size if len(lines) < options.num_documents else len(lines)
    with output.open("r+b") as stream:
        stream.truncate(sum(len(line) + 1 for line in lines[:complete]))
    return complete


def _prompts_digest(prompts: Sequence[str]) -> str:
    return f"{len(prompts)} prompts, SHA-256 {hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()}"


def _load(model_dir: str | Path, dtype: str, device: str):
    if not Path(model_dir).is_dir():
        raise QADError(
            f"--model {model_dir} is not a directory. Expected a local Hugging Face model; nothing is downloaded."
        )
    try:
        config = local_config(model_dir)
    except QADError:
        raise
    except Exception as error:  # transformers raises errors of any class for damaged files
        raise _cannot_load(model_dir, error) from error
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

    from megatron_qad.engine.cpu.speedups.grouped_attention import register

    # MLP layers of Nemotron-H have no cache, like its expert layers; transformers 5.14 maps only the latter.
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
            dtype=getattr(torch, dtype),
        )
        if torch.device(device).type == "cpu" and model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(register())
    except Exception as error:  # transformers raises errors of any class for damaged files
        raise _cannot_load(model_dir, error) from error
    # Only the EOS ids of generation_config.json are kept: a repetition penalty would change the model's distribution.
    ends = model.generation_config.eos_token_id
    if ends is not None and not all(type(id_) is int for id_ in (ends if isinstance(ends, list) else [ends])):
        raise QADError(f"--model {model_dir}: eos_token_id is {ends!r:.100}, expected an integer or a list of them.")
    model.generation_config = GenerationConfig(eos_token_id=ends)
    return model.to(device).eval(), tokenizer


def _cannot_load(model_dir: str | Path, error: Exception) -> QADError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return QADError(f"--model {model_dir}: transformers cannot load it: {reason:.500}")


def _sample_batch(model, tokenizer, prompts: list[str] | None, size: int, options: GenerateOptions) -> list[dict]:
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
            turns = [{"role": "user", "content": prompts[i]}, {"role": "assistant", "content": text}]
            lines.append({"messages": turns, **line})
    return lines


def _start_ids(tokenizer, prompts: list[str] | None, size: int) -> list[list[int]]:
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
                    [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True, return_dict=True
                )["input_ids"]
            )
            for prompt in prompts
        ]
