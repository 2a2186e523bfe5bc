"""User prompts that SmolLM2 answers to generate its training text: four tasks per topic, all tasks equally often.

Held-out topics, with all tasks, appear in no training prompt. ``python prompts.py DIR`` writes train-1.txt, train-2.txt
and heldout.txt to DIR.
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
    train = [task.format(topic) for i, topic in enumerate(TRAIN_TOPICS) for task in TASKS[i % 4 :: 4]]
    heldout = [task.format(topic) for topic in HELDOUT_TOPICS for task in TASKS]
    # Two processes generate answers; the one with the held-out prompts gets fewer training prompts.
    for name, prompts in (("train-1", train[:192]), ("train-2", train[192:]), ("heldout", heldout)):
        (directory / f"{name}.txt").write_text("\n".join(prompts) + "\n")


if __name__ == "__main__":
    main()
