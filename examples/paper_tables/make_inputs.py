"""Makes the inputs of the experiments without downloads: texts, chats, prompts, a tokenizer, and untrained models.

- ``pretraining_problems``, ``pretraining_text``: for pretraining. Chats of problems (most sums in steps), whose answers
  count in the loss, and CPython's own help (``pydoc_data.topics``).
- ``sft_sums``, ``sft_letters``, ``sft_language``: chats for the cold start. Their answers are as a crowd would write
  them: half of the sums at once, half in steps, and some with a mistake. ``sft_language`` continues sentences of the
  help.
- ``noisy_*``: the same, with the answers of one chat in ten exchanged among these chats (label noise).
- ``steps_sums``, ``steps_letters``: other problems, all in steps and right, for a second stage of SFT.
- ``prompts``: problems without answers, for reinforcement learning and for generated data.
- ``heldout``: chats like those of the cold start, whose problems and sentences no other file has;
  ``heldout_prompts``: problems only; ``heldout_answers``: these problems with each of their right answers.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from problems import RANDOM, Problem, spoiled

sys.path.insert(0, str(Path(__file__).parents[1]))
from random_hybrid import CONFIG, EXPERTS, write_model  # noqa: E402

VOCAB_SIZE = 512
HELDOUT_EVERY = 10
"""One topic in so many is held out."""
NUM_PRETRAINING, NUM_SFT, NUM_STEPS, NUM_PROMPTS, NUM_HELDOUT = 60000, 6000, 4000, 8000, 300
"""Problems of each domain."""
FEWEST = 10
"""Problems of a domain in a trial."""
SHARE_AT_ONCE, SHARE_AT_ONCE_IN_PRETRAINING = 0.5, 0.2
SHARE_SPOILED = {"sums": 0.1, "letters": 0.2}
SHARE_NOISY = 0.1
SENTENCE_LENGTHS = (40, 160)
"""Shortest and longest sentence of a chat, in characters."""
SIZES = {
    "small": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4},
    "large": {"hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 6, "num_attention_heads": 6},
}
"""Shapes of the Llamas."""
HYBRID = CONFIG | {
    "hybrid_override_pattern": "MEM*EM*E",
    "num_hidden_layers": 8,
    "vocab_size": VOCAB_SIZE,
    "intermediate_size": 128,
    "mamba_num_heads": 4,
    "mamba_head_dim": 64,
    "n_groups": 1,
    "ssm_state_size": 32,
    "chunk_size": 128,
    **EXPERTS,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}
"""Config of the model with Mamba, attention and experts."""
UNTRAINED = (*SIZES, "hybrid")
"""Names of the untrained models."""
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<s>", "</s>", "<|user|>", "<|assistant|>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--share", type=float, default=1, help="share of the problems that are made (default: 1)")
    options = parser.parse_args()
    options.output.mkdir(parents=True)
    texts = write_texts(options.output, options.share)
    for size, shape in SIZES.items():
        write_llama(options.output / size, shape)
    (options.output / "hybrid").mkdir()
    write_model(options.output / "hybrid", HYBRID)
    for name in UNTRAINED:
        write_tokenizer(options.output / name, texts)
    print(f"wrote texts, chats, a tokenizer and {len(UNTRAINED)} untrained models to {options.output}")


def write_texts(output: Path, share: float) -> list[str]:
    """Write all files. Returns texts for the tokenizer."""
    rng = np.random.default_rng(0)
    names = sorted(topics)
    heldout_topics = names[::HELDOUT_EVERY]
    paragraphs = [p for name in names if name not in heldout_topics for p in _paragraphs(topics[name])]
    sentences = [s for p in paragraphs for s in _sentences(p)]
    heldout_sentences = [s for name in heldout_topics for p in _paragraphs(topics[name]) for s in _sentences(p)]

    seen: set[str] = set()

    def some(domain: str, count: int) -> list[Problem]:
        """Return problems that were not returned before."""
        found: dict[str, Problem] = {}
        while len(found) < max(FEWEST, count):
            problem = RANDOM[domain](rng)
            if problem.question not in seen:
                found[problem.question] = problem
        seen.update(found)
        return list(found.values())

    def cold_start(problems: list[Problem]) -> list[dict]:
        return [_problem_chat(p, _crowd_answer(p, rng)) for p in problems]

    def language(texts: list[str]) -> list[dict]:
        return [_continuation(text) for text in texts]

    files: dict[str, list[dict]] = {}
    heldout = {domain: some(domain, int(NUM_HELDOUT * share)) for domain in RANDOM}
    num_sentences = max(FEWEST, int(min(NUM_HELDOUT, len(heldout_sentences)) * share))
    spoken = list(rng.choice(heldout_sentences, num_sentences, replace=False))
    files["heldout"] = [chat for p in heldout.values() for chat in cold_start(p)] + language(spoken)
    files["heldout_prompts"] = [_prompt(problem) for problems in heldout.values() for problem in problems]
    files["heldout_answers"] = [
        _problem_chat(p, answer)
        for ps in heldout.values()
        for p in ps
        for answer in dict.fromkeys((p.at_once, p.in_steps))
    ]
    files["prompts"] = [_prompt(p) for domain in RANDOM for p in some(domain, int(NUM_PROMPTS * share))]
    for domain in RANDOM:
        files[f"sft_{domain}"] = cold_start(some(domain, int(NUM_SFT * share)))
        files[f"steps_{domain}"] = [_problem_chat(p, p.in_steps) for p in some(domain, int(NUM_STEPS * share))]
    files["sft_language"] = language(sentences)
    for name in [*RANDOM, "language"]:
        files[f"noisy_{name}"] = _with_exchanged_answers(files[f"sft_{name}"], rng)
    worked = [p for domain in RANDOM for p in some(domain, int(NUM_PRETRAINING * share))]
    files["pretraining_problems"] = [
        _problem_chat(p, p.at_once if rng.random() < SHARE_AT_ONCE_IN_PRETRAINING else p.in_steps) for p in worked
    ]
    files["pretraining_text"] = [{"text": paragraph} for paragraph in paragraphs]
    for name, records in files.items():
        if name not in ("heldout_prompts", "heldout_answers", "prompts"):
            records = [records[i] for i in rng.permutation(len(records))]
        (output / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    some_worked = worked[:: len(worked) // len(paragraphs) + 1]
    return paragraphs + [f"{problem.question} {problem.in_steps}" for problem in some_worked]


def _crowd_answer(problem: Problem, rng: np.random.Generator) -> str:
    answer = problem.at_once if rng.random() < SHARE_AT_ONCE else problem.in_steps
    return spoiled(problem, answer, rng) if rng.random() < SHARE_SPOILED[problem.domain] else answer


def _chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _problem_chat(problem: Problem, answer: str) -> dict:
    return _chat(problem.question, answer)


def _prompt(problem: Problem) -> dict:
    return {"prompt": problem.question, "domain": problem.domain, "result": problem.result}


def _continuation(sentence: str) -> dict:
    """Return a chat that asks for the second half of a sentence."""
    words = sentence.split(" ")
    half = len(words) // 2
    return _chat(f"continue: {' '.join(words[:half])}", " ".join(words[half:]))


def _with_exchanged_answers(chats: list[dict], rng: np.random.Generator) -> list[dict]:
    chosen = np.flatnonzero(rng.random(len(chats)) < SHARE_NOISY)
    result = list(chats)
    for i, other in zip(chosen, np.roll(chosen, 1), strict=True):
        result[i] = _chat(chats[i]["messages"][0]["content"], chats[other]["messages"][1]["content"])
    return result


def _paragraphs(text: str) -> list[str]:
    return [" ".join(p.split()) for p in re.split(r"\n\s*\n", text) if len(p.split()) > 8]


def _sentences(paragraph: str) -> list[str]:
    shortest, longest = SENTENCE_LENGTHS
    return [s for s in re.split(r"(?<=[.?!]) ", paragraph) if shortest <= len(s) <= longest]


def write_llama(directory: Path, shape: dict) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        dtype=torch.float32,
        **shape,
    )
    LlamaForCausalLM(config).float().save_pretrained(directory)


def write_tokenizer(directory: Path, texts: list[str]) -> None:
    """Write a byte-level BPE tokenizer that has one token for each digit."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)


if __name__ == "__main__":
    main()
