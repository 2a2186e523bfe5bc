"""The user prompts that SmolLM2 answers to make its own training text: every task with every topic.

Held-out topics appear in no training prompt. ``python prompts.py DIR`` writes train-1.txt, train-2.txt and heldout.txt
there.
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
    "black holes",
    "learning the guitar",
    "recycling",
    "the Roman Empire",
    "home insurance",
    "dogs",
    "coral reefs",
    "public speaking",
    "coffee",
    "fractions",
    "long-distance running",
    "mushrooms",
    "the printing press",
    "job interviews",
    "earthquakes",
    "spreadsheets",
    "photography",
    "vaccines",
    "train travel",
    "knitting",
    "the stock market",
    "whales",
    "time zones",
    "gardening in winter",
    "robots",
    "making friends",
    "soccer",
    "sourdough",
    "maps",
    "the human heart",
    "renewable energy",
    "password safety",
    "glaciers",
    "beekeeping",
    "airports",
    "poetry",
    "camping",
    "the periodic table",
    "houseplants",
    "ancient Egypt",
    "bridges",
    "meditation",
    "cheese",
    "satellites",
    "birdwatching",
    "taxes",
    "swimming",
    "dinosaurs",
    "opera",
    "carpentry",
    "rivers",
    "microwave ovens",
    "board games",
    "the moon",
    "email etiquette",
    "bicycles",
)
HELDOUT_TOPICS = ("lighthouses", "growing tomatoes")


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    # Two processes answer; the one with the held-out prompts has fewer of the others.
    parts = (("train-1", TRAIN_TOPICS[:36]), ("train-2", TRAIN_TOPICS[36:]), ("heldout", HELDOUT_TOPICS))
    for name, topics in parts:
        prompts = [task.format(topic) for topic in topics for task in TASKS]
        (directory / f"{name}.txt").write_text("\n".join(prompts) + "\n")


if __name__ == "__main__":
    main()
