"""The user prompts that SmolLM2 answers to make its own training text: every task with every topic.

Held-out topics appear in no training prompt. ``python prompts.py DIR`` writes DIR/train.txt and DIR/heldout.txt.
"""

import sys
from pathlib import Path

TASKS = (
    "Explain {} to a ten-year-old.",
    "Write a short story about {}.",
    "Give me five interesting facts about {}.",
    "What are common misconceptions about {}?",
    "Write a polite email to a colleague asking for help with {}.",
    "List the pros and cons of {}.",
    "Write a short poem about {}.",
    "How did {} change over the last hundred years?",
    "Write a dialogue between a teacher and a student about {}.",
    "Summarize what an expert would say about {} in one paragraph.",
    "Write a Python function that has something to do with {} and explain it.",
    "Make a one-week plan for somebody who wants to learn about {}.",
    "What questions should I ask before spending money on {}?",
    "Compare {} with something similar.",
    "Write a quiz with three questions and answers about {}.",
    "Give step-by-step instructions for a beginner in {}.",
)
TRAIN_TOPICS = (
    "volcanoes",
    "baking bread",
    "electric cars",
    "chess",
    "sleep",
    "bicycle repair",
    "bees",
    "public libraries",
)
HELDOUT_TOPICS = ("lighthouses", "growing tomatoes")


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for name, topics in (("train", TRAIN_TOPICS), ("heldout", HELDOUT_TOPICS)):
        prompts = [task.format(topic) for topic in topics for task in TASKS]
        (directory / f"{name}.txt").write_text("\n".join(prompts) + "\n")


if __name__ == "__main__":
    main()
