"""Makes the inputs of the example without downloads: pictures, chats about them and about text, tokenizer and config.

All chats are JSONL files next to the folder ``pictures``:

- ``captions``, ``questions``: training chats with a picture; the answer to a question is one word.
- ``text``: training chats without pictures, with answers of one word.
- ``sentences``: questions of both kinds, on other pictures, whose answers are sentences.
- ``heldout_words``, ``heldout_sentences``: the same questions on pictures that no other file has, and on text, one
  question for each picture, with answers of one word and as sentences.

A picture and its question take 25 to 32 tokens and a text with an answer of one word 16, so that a row of 32 tokens
(``train.yaml``) has one picture or two such texts, and no chat is cut.

``train_encoder.py`` adds the weights.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pictures import COLORS, PLACES, SHAPES, SIDE, Picture, random_picture

sys.path.insert(0, str(Path(__file__).parents[1]))
from random_hybrid import CONFIG  # noqa: E402

NOUNS = ("tree", "moon", "river", "stone", "cloud", "house", "bird", "lamp", "boat", "leaf", "door", "fish")
ORDINALS = ("first", "second", "third", "fourth", "fifth")
MAX_SUM = 18
SPECIAL = ("<image>", "<img>", "</img>", "<|user|>", "<|assistant|>", "</s>")
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCAB_SIZE = 128
LANGUAGE_MODEL = CONFIG | {
    "hybrid_override_pattern": "M-*-",
    "num_hidden_layers": 4,
    "vocab_size": VOCAB_SIZE,
    "intermediate_size": 256,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "n_groups": 2,
    "ssm_state_size": 16,
    "chunk_size": 256,
    "max_position_embeddings": 512,
}
PATCH, WIDTH, BLOCKS, HEADS = 8, 96, 2, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--pictures", type=int, default=6000, help="training pictures (default: 6000)")
    parser.add_argument(
        "--heldout", type=int, default=1200, help="held-out pictures, and held-out texts (default: 1200)"
    )
    options = parser.parse_args()
    write_chats(options.output, options.pictures, options.heldout)
    directory = options.output / "hf"
    directory.mkdir()
    image_id = write_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps(config(image_id), indent=1))
    print(f"wrote {options.pictures} training and {options.heldout} held-out pictures, chats and a tokenizer")


def config(image_id: int) -> dict:
    """Return the config of the model: 16 features for the one tile of a picture."""
    return {
        "architectures": ["NemotronH_Nano_VL_V2"],
        "model_type": "NemotronH_Nano_VL_V2",
        "force_image_size": SIDE,
        "patch_size": PATCH,
        "downsample_ratio": 0.5,
        "vit_hidden_size": WIDTH,
        "projector_hidden_size": 2 * WIDTH,
        "img_context_token_id": image_id,
        "max_dynamic_patch": 1,
        "torch_dtype": "bfloat16",
        "vision_config": {
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": HEADS,
            "intermediate_size": 2 * WIDTH,
            "patch_size": PATCH,
            "max_resolution": SIDE,
            "num_cls_tokens": 2,
        },
        "llm_config": LANGUAGE_MODEL,
    }


def write_chats(output: Path, num_pictures: int, num_heldout: int) -> None:
    """Write the pictures and the files of chats."""
    rng = np.random.default_rng(0)
    (output / "pictures").mkdir(parents=True)
    chats = {name: [] for name in ("captions", "questions", "text", "sentences", "heldout_words", "heldout_sentences")}
    for i in range(num_pictures):
        picture = random_picture(rng)
        path = _save(picture, output, f"train{i}")
        chats["captions"].append(_chat("describe", picture.caption, path))
        questions = picture.questions()
        for k in rng.choice(len(questions), 3, replace=False):
            question, word, sentence = questions[k]
            if i % 2:
                chats["sentences"].append(_chat(question, sentence, path))
            chats["questions"].append(_chat(question, word, path))
    for _ in range(4 * num_pictures):
        question, word, _ = text_question(rng)
        chats["text"].append(_chat(question, word))
    for _ in range(num_pictures):
        question, _, sentence = text_question(rng)
        chats["sentences"].append(_chat(question, sentence))
    for i in range(num_heldout):
        picture = random_picture(rng)
        path = _save(picture, output, f"heldout{i}")
        questions = picture.questions()
        for (question, word, sentence), image in ((questions[i % len(questions)], path), (text_question(rng), None)):
            chats["heldout_words"].append(_chat(question, word, image))
            chats["heldout_sentences"].append(_chat(question, sentence, image))
    for name, lines in chats.items():
        (output / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def text_question(rng: np.random.Generator) -> tuple[str, str, str]:
    """Return (question of 12 words, answer of one word, answer as a sentence) without a picture."""
    kind = rng.integers(3)
    if kind == 0:
        a, b = rng.integers(0, MAX_SUM // 2 + 1, 2)
        question, word = f"if you add {a} and {b} , what is the sum ?", str(a + b)
    elif kind == 1:
        *most, last = numbers = rng.choice(MAX_SUM + 1, 5, replace=False)
        question, word = f"which is the largest of {' '.join(map(str, most))} and {last} ?", str(max(numbers))
    else:
        words, place = rng.choice(NOUNS, len(ORDINALS), replace=False), rng.integers(len(ORDINALS))
        question, word = f"in {' '.join(words)} . which word is {ORDINALS[place]} ?", str(words[place])
    return question, word, f"the answer is {word} ."


def _save(picture: Picture, output: Path, name: str) -> str:
    path = f"pictures/{name}.png"
    picture.draw().save(output / path)
    return path


def _chat(question: str, answer: str, image: str | None = None) -> dict:
    content: Sequence[dict] = [{"type": "text", "text": question}]
    if image is not None:
        content = [{"type": "image", "path": image}, *content]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def write_tokenizer(directory: Path) -> int:
    """Write a tokenizer with one token for each word of the example. Returns the id of ``<image>``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    phrases = (
        "describe a at the and . , ? it is in of if you add which what where shape color digit word largest sum answer"
    )
    numbers = map(str, range(MAX_SUM + 1))
    words = ["<unk>", *phrases.split(), *SHAPES, *COLORS, *PLACES, *NOUNS, *ORDINALS, *numbers]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    assert tokenizer.get_vocab_size() <= VOCAB_SIZE
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)
    return tokenizer.token_to_id("<image>")


if __name__ == "__main__":
    main()
