"""A benchmark for lm-evaluation-harness from CPython's help text: which of four endings continues a sentence.

The wrong endings are those of other sentences of the same topic. ``python cloze.py DIR`` writes the task file
cloze.yaml and its 200 problems, cloze.jsonl. The text is not in the training data of the example.
"""

import json
import pydoc_data.topics
import random
import re
import sys
from pathlib import Path

NUM_PROBLEMS = 200
TASK = """\
task: cpython_cloze
dataset_path: json
dataset_kwargs: {data_files: {test: cloze.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def sentences(text: str) -> list[list[str]]:
    """Return the words of each sentence of 12 to 30 words that has no code but names in it."""
    found = re.split(r"(?<=[a-z)])\.\s+(?=[A-Z])", " ".join(text.split()))
    plain = (sentence.split() for sentence in found if re.fullmatch(r"""[A-Z][A-Za-z ,;'"*()_-]+""", sentence))
    return [words for words in plain if 12 <= len(words) <= 30]


def main(directory: Path) -> None:
    generator = random.Random(1)
    problems = []
    for _, text in sorted(pydoc_data.topics.topics.items()):
        halves = [(" ".join(w[: len(w) // 2]), " " + " ".join(w[len(w) // 2 :]) + ".") for w in sentences(text)]
        for context, ending in halves:
            others = sorted({other for _, other in halves} - {ending})
            if len(others) >= 3:
                choices = [ending, *generator.sample(others, 3)]
                generator.shuffle(choices)
                problems.append({"context": context, "choices": choices, "label": choices.index(ending)})
    chosen = generator.sample(problems, NUM_PROBLEMS)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "cloze.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in chosen))
    (directory / "cloze.yaml").write_text(TASK)
    print(f"{NUM_PROBLEMS} of {len(problems)} problems in {directory}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
