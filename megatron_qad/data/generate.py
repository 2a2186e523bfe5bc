"""Training text that the teacher writes itself, sampled with plain transformers.

From BOS alone the model writes whole documents, ``{"text": ...}``; from prompts it answers as the assistant,
``{"messages": [user, assistant]}``. Lines are written batch by batch, and a run that is started again goes on after the
last whole batch with the same text that an uninterrupted run would have written. Left out: several GPUs, serving
engines (vLLM is faster by far where it is installed), filters by correctness.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_qad.data.sampling import Sampler
from megatron_qad.engine.cpu.speedups import bf16_matmul_fallback
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import locks


@dataclass(frozen=True)
class GenerateOptions:
    """How text is sampled; all of it must be the same when a run goes on."""

    num_documents: int
    """Lines of the finished file. More than there are prompts: the prompts go round, each time with other samples."""
    max_new_tokens: int = 512
    """Longest document or answer, in tokens."""
    batch_size: int = 16
    """Documents sampled at a time; part of what a seed means."""
    temperature: float = 1.0
    """Above 0; 1 is the model's own distribution."""
    top_p: float = 1.0
    """Smallest probability mass to sample from; 1 turns it off."""
    seed: int = 1234
    """Batch b is sampled with seed + b."""
    dtype: str = "bfloat16"
    """"bfloat16" or "float32"."""


def generate_documents(
    hf_model_dir: str | Path,
    prompts: Sequence[str] | None,
    output: str | Path,
    options: GenerateOptions,
    device: str = "cpu",
) -> int:
    """Sample documents into a JSONL file that ``tools/prepare_data.py`` reads.

    Each line has ``"finish"``: "eos" where the model ended the text, "length" where ``max_new_tokens`` did.

    Args:
        hf_model_dir: Hugging Face directory of a causal language model with its tokenizer.
        prompts: what the user says, one string a document, through the chat template; None starts from BOS alone.
        output: JSONL file. Beside it, OUTPUT.settings.json says how it was made.
        options: see ``GenerateOptions``.
        device: torch device of the model.

    Returns:
        Number of lines written by this call.

    Raises:
        QADError: bad options, no such model, no BOS or chat template where one is needed, or an output that was begun
            with other settings.
    """
    _check(options, prompts)
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
    """The prompts of a text file, one a line; blank lines are none.

    Raises:
        QADError: the file is missing, not UTF-8, or empty.
    """
    try:
        # Not splitlines(), nor text mode: those end a line at other characters, too (U+2028, \x0b, a lone \r).
        lines = Path(path).read_bytes().decode("utf-8").split("\n")
        prompts = [line.strip() for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise QADError(f"--prompts {path} cannot be read: {error}. Expected UTF-8 text, one prompt a line.") from error
    if not prompts:
        raise QADError(f"--prompts {path} holds no prompt. Expected one a line.")
    return prompts


def _check(options: GenerateOptions, prompts: Sequence[str] | None) -> None:
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
    """Cut the output back to whole batches and return its number of lines; note the settings if it is new."""
    settings_path = Path(f"{output}.settings.json")
    settings = {"model": str(Path(model_dir).resolve()), "prompts": None if prompts is None else _fingerprint(prompts)}
    settings |= {k: v for k, v in asdict(options).items() if k != "num_documents"}  # a longer file begins the same way
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        settings_path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return 0
    if not settings_path.is_file():
        raise QADError(f"{output} exists without {settings_path.name}, so it cannot be continued. Choose another file.")
    found = json.loads(settings_path.read_text(encoding="utf-8"))
    differing = sorted(k for k in settings.keys() | found.keys() if settings.get(k) != found.get(k))
    if differing:
        raise QADError(
            f"{output} was begun with other settings: {', '.join(differing)} differ from {settings_path.name}. Give "
            "the same settings to continue it, or choose another file."
        )
    lines = output.read_bytes().split(b"\n")[:-1]  # what follows the last newline was cut off while being written
    whole = len(lines) - len(lines) % options.batch_size if len(lines) < options.num_documents else len(lines)
    with output.open("r+b") as stream:
        stream.truncate(sum(len(line) + 1 for line in lines[:whole]))
    return whole


def _fingerprint(prompts: Sequence[str]) -> str:
    return f"{len(prompts)} prompts, SHA-256 {hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()}"


def _load(model_dir: str | Path, dtype: str, device: str):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

    from megatron_qad.engine.cpu.speedups.grouped_attention import register

    if not Path(model_dir).is_dir():
        raise QADError(f"--model {model_dir} is not a directory. Expected a Hugging Face model; none is downloaded.")
    # An MLP layer of a Nemotron-H keeps as little as one of experts: nothing. transformers 5.14 knows only the latter.
    DYNAMIC_LAYER_TYPE_MAPPING.setdefault("mlp", DYNAMIC_LAYER_TYPE_MAPPING["moe"])
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            str(model_dir),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,  # other files are pickles, which run code
            dtype=getattr(torch, dtype),
        )
        if torch.device(device).type == "cpu" and model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(register())
    except (OSError, ValueError, KeyError) as error:
        raise QADError(f"--model {model_dir}: transformers cannot load it: {error}") from error
    # Of what its makers advise for serving only the end stays: a repetition penalty would make it another model's text.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return model.to(device).eval(), tokenizer


def _sample_batch(model, tokenizer, prompts: list[str] | None, size: int, options: GenerateOptions) -> list[dict]:
    """``size`` JSONL lines; prompts are padded on the left, so that all begin to write at the same column."""
    from transformers import GenerationConfig, LogitsProcessorList

    from megatron_qad.engine.cpu.speedups.preallocated_kv_cache import preallocated_cache

    end = model.generation_config.eos_token_id
    ends = set(end if isinstance(end, list) else [end]) | {tokenizer.eos_token_id}
    ends.discard(None)
    if not ends:
        raise QADError(f"The model {model.name_or_path} has no EOS id: it would not know when a document ends.")
    starts = _start_ids(tokenizer, prompts, size)
    width = max(len(ids) for ids in starts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in starts])
    attention = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in starts])
    config = GenerationConfig(
        do_sample=False,  # the sampler's scores leave one token
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
        written = row if stop is None else row[:stop]
        # From BOS the text keeps its special tokens: they are part of what the model wrote, and the tokenizer reads
        # them back. In an answer the chat template writes them.
        text = tokenizer.decode(written, skip_special_tokens=prompts is not None, clean_up_tokenization_spaces=False)
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
            raise QADError(f"{tokenizer.name_or_path} has neither BOS nor EOS to start from. Give prompts.")
        return [[start]] * size
    if not tokenizer.chat_template:
        raise QADError(
            f"{tokenizer.name_or_path} has no chat template for the prompts. Leave them out to start from BOS."
        )
    return [
        list(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
        )
        for prompt in prompts
    ]
