"""Reproduces tables of the QAD report on a small model of sums with a scratchpad, letters to sort, and language.

    python examples/paper_tables/run.py rl --output runs/paper_tables
    python examples/paper_tables/run.py all --output runs/paper_tables --seeds 1 2 3

A table is one of experiments.TABLES. What several tables share runs once, and a second call continues after a kill.
Each table goes to OUTPUT/tables/TABLE.md as soon as its students have finished. ``--trial`` makes few problems and two
steps of everything.
"""

import argparse
import sys
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from experiments import DATA, MODELS, SAMPLES, STUDENTS, TABLES, is_hybrid  # noqa: E402
from jobs import Job, run_jobs  # noqa: E402
from make_inputs import UNTRAINED  # noqa: E402
from results import label, table  # noqa: E402

STEPS = 200
"""Steps of QAT and QAD, of 16 rows of 128 tokens."""
NUM_GENERATED = 8000
"""Answers of each kind of generated data, about as many chats as those of SFT."""
BATCH = 300
"""Answers that are sampled together."""

LONG_ROWS = (
    *("--seq-length", 2048, "--dataloader-inter-document-masking", "--num-workers", 0),
    *("--micro-batch-size", 1, "--global-batch-size", 1),
)
"""Flags of an evaluation with rows so long that few chats are split between two of them."""


@dataclass(frozen=True)
class Sizes:
    """How much is done; fewer of everything in a trial."""

    steps: int | None = None
    """Of each training; None: those of ``experiments``."""
    share_of_problems: float = 1
    num_generated: int = NUM_GENERATED
    groups: int = 32
    check: str = "is_right"
    """Function of problems.py that chooses the answers in the data ``correct``."""
    flags: tuple[str, ...] = ()
    """More flags of every training, such as a smaller batch."""


TRIAL = Sizes(
    steps=2,
    share_of_problems=0.004,
    num_generated=20,
    groups=2,
    check="is_answer",
    flags=(
        *("--global-batch-size", "2", "--micro-batch-size", "1", "--lr-warmup-iters", "1"),
        *("--eval-iters", "1", "--qad-calibration-samples", "2"),
    ),
)


class Plan:
    """Collects the jobs that the chosen tables need, and which of them must finish before which.

    Args:
        output: directory of everything.
        sizes: how much is done.
    """

    def __init__(self, output: Path, sizes: Sizes):
        self.output, self.sizes, self.jobs = output, sizes, {}

    def add(self, name: str, *words: object, needs: tuple[str, ...] = (), ranks: int = 1) -> str:
        """Add a job, unless one of this name exists. Returns the name."""
        self.jobs.setdefault(name, Job(name, tuple(map(str, words)), needs, ranks))
        return name

    def inputs(self) -> str:
        return self.add(
            "inputs", HERE / "make_inputs.py", self.output / "inputs", "--share", self.sizes.share_of_problems
        )

    def data(self, name: str) -> str:
        """Tokenize one of ``DATA``, or generated data."""
        if name in DATA:
            needs, files = self.inputs(), [self.output / f"inputs/{file}.jsonl" for file in DATA[name]]
        elif name == "correct":
            needs, files = self.correct(), [self.output / "generated/correct.jsonl"]
        else:
            needs, files = self.generated(name), [self.output / f"generated/{name}.jsonl"]
        prepare = [
            "prepare",
            "--input",
            *files,
            "--tokenizer",
            self.output / "inputs/small",
            "--output",
            self.output / "data" / name,
        ]
        if name == "bos":
            prepare += ["--max-bad-fraction", 1]  # empty texts: the model may end at once
        return self.add(f"data/{name}", *prepare, needs=(needs,))

    def correct(self) -> str:
        source, file = self.generated("generated"), self.output / "generated/correct.jsonl"
        words = [
            "--input",
            self.output / "generated/generated.jsonl",
            "--check",
            f"{HERE / 'problems.py'}:{self.sizes.check}",
        ]
        return self.add("generated/correct", "filter", *words, "--output", file, needs=(source,))

    def generated(self, name: str) -> str:
        model, source = SAMPLES[name]
        count = self.sizes.num_generated
        words = {
            "prompts": ["--prompts", self.output / "inputs/prompts.jsonl", "--max-new-tokens", 64],
            "bos": ["--max-new-tokens", 128],
            "random": ["--random-tokens", "--max-new-tokens", 128],
        }[source]
        if source == "random":
            count //= 4  # of 128 tokens each, where an answer with its question has about 30
        return self.sample(f"generated/{name}", model, *words, "--num-documents", count)

    def sample(self, name: str, model: str, *words: object) -> str:
        """Sample texts from an exported model."""
        directory = self.exported(model)
        job = ["generate", "--model", self.output / "hf" / model, "--output", self.output / f"{name}.jsonl", *words]
        return self.add(name, *job, "--batch-size", BATCH, "--dtype", "float32", "--device", "cpu", needs=(directory,))

    def model(self, name: str) -> str:
        """Train or import one of ``MODELS``, or an untrained model."""
        if name in UNTRAINED:
            return self.imported(name, self.output / "inputs" / name, self.inputs())
        model = MODELS[name]
        if not model.data:
            return self.imported(name, self.output / "hf" / name, self.reinforced(name))
        words = ["--qad-loss", "ce", "--qad-policy", "bf16", "--qad-student", self.output / "models" / model.start]
        words += ["--qad-train-router"] if is_hybrid(name) else []
        needs = (self.model(model.start),)
        return self.train(f"models/{name}", model.data, model.steps, model.lr, *words, needs=needs, ranks=2)

    def imported(self, name: str, directory: Path, needs: str) -> str:
        words = ["--hf-model", directory, "--output", self.output / "models" / name, "--dtype", "float32"]
        return self.add(f"models/{name}", "import", *words, needs=(needs,))

    def reinforced(self, name: str) -> str:
        model = MODELS[name]
        words = ["--model", self.output / "hf" / model.start, "--prompts", self.output / "inputs/prompts.jsonl"]
        words += ["--output", self.output / "hf" / name, "--learning-rate", model.lr, "--groups", self.sizes.groups]
        words += ["--steps", self.sizes.steps or model.steps]
        return self.add(f"hf/{name}", HERE / "grpo.py", *words, needs=(self.exported(model.start),))

    def train(
        self, name: str, data: str, steps: int, lr: float, *words: object, needs: tuple[str, ...], ranks: int = 1
    ) -> str:
        job = ["train", *self.settings(data), "--save", self.output / name, *words]
        job += ["--train-iters", self.sizes.steps or steps, "--lr", lr]
        return self.add(name, *job, needs=(*needs, self.data(data), self.data("heldout")), ranks=ranks)

    def settings(self, data: str) -> list[object]:
        """Return the flags that all jobs share: train.yaml and the data."""
        paths = ["--train-data-path", self.output / "data" / data, "--valid-data-path", self.output / "data/heldout"]
        return ["--config", HERE / "train.yaml", *paths, *self.sizes.flags]

    def student(self, label: str) -> str:
        """Quantize, and unless it is PTQ train, a student. ``label`` is its name and a seed (``results.label``)."""
        name, seed = label.rsplit("-", 1)
        student, run = STUDENTS[name], f"students/{label}"
        teacher = student.distilled_from or student.teacher
        needs = (self.model(student.teacher), self.model(teacher))
        flags = ["--qad-policy", HERE / student.policy, "--qad-teacher", self.output / "models" / teacher]
        if teacher != student.teacher:
            flags += ["--qad-student", self.output / "models" / student.teacher]
        if not student.loss:
            job = ["ptq", *self.settings(student.data), *flags, "--save", self.output / run]
            return self.add(run, *job, needs=(*needs, self.data(student.data), self.data("heldout")))
        flags += ["--qad-loss", student.loss, "--seed", seed]
        return self.train(run, student.data, STEPS, student.lr, *flags, needs=needs)

    def checkpoint(self, label: str) -> str:
        """Train a model or a student. Returns its job, which is also its directory in ``output``."""
        return self.model(label) if label in MODELS else self.student(label)

    def exported(self, label: str) -> str:
        """Export a model or a student for transformers."""
        if label in MODELS and not MODELS[label].data:
            return self.reinforced(label)
        run, layout = self.checkpoint(label), "bf16" if label in MODELS else "compressed-tensors"
        words = ["--checkpoint", self.output / run, "--output", self.output / "hf" / label, "--layout", layout]
        return self.add(f"hf/{label}", "export", *words, needs=(run,))

    def measured(self, label: str) -> list[str]:
        """Add the jobs that measure a model's KL on held-out chats and its answers to held-out problems. Returns them.

        Answers are sampled from the export. transformers cannot load the export of a quantized hybrid, so hybrids are
        evaluated on the right answers instead (``results.right``).
        """
        run = self.checkpoint(label)
        student = None if label in MODELS else STUDENTS[label.rsplit("-", 1)[0]]
        teacher = student.teacher if student else label
        flags = ["--qad-teacher", self.output / "models" / teacher, *self.settings("sft")]
        needs = (run, self.model(teacher), self.data("sft"), self.data("heldout"))
        words = ["--model", self.output / run, "--output", self.output / "records" / label, "--name", label]
        done = [self.add(f"records/{label}", "evaluate", *words, *flags, needs=needs)]
        if is_hybrid(label):
            words = ["--model", self.output / run, "--output", self.output / "answers" / label, "--name", label]
            words += ["--qad-teacher", self.output / "models" / teacher, *LONG_ROWS]
            words += ["--valid-data-path", self.output / "data/heldout_answers"]
            needs_answers = (run, self.model(teacher), self.data("heldout_answers"))
            done.append(self.add(f"answers/{label}", "evaluate", *words, needs=needs_answers))
        else:
            prompts = ["--prompts", self.output / "inputs/heldout_prompts.jsonl", "--max-new-tokens", 64]
            done.append(self.sample(f"answers/{label}", label, *prompts))
        if label.endswith("/qad-1"):
            words = ["--qad-policy", HERE / student.policy, "--qad-student", self.output / run]
            words += ["--output", self.output / f"records/{label}/noise.json", *flags]
            done.append(self.add(f"noise/{label}", "noise-floor", *words, needs=(done[0], *needs)))
        return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "tables", nargs="+", choices=[*TABLES, "all"], metavar="TABLE", help=f"all, {', '.join(TABLES)}"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--trial", action="store_true", help="few problems and two steps of everything")
    parser.add_argument("--parallel", type=int, default=2, help="jobs at a time, each with one thread (default: 2)")
    options = parser.parse_args()
    output = options.output.resolve()
    names = list(TABLES) if "all" in options.tables else options.tables
    (output / "tables").mkdir(parents=True, exist_ok=True)
    plan, rows = Plan(output, TRIAL if options.trial else Sizes()), {}
    for seed in options.seeds:
        for name in names:
            rows[name, seed] = {job for row in TABLES[name].rows for job in plan.measured(label(row, seed))}

    def write_tables(finished: Set[str]) -> None:
        for (name, seed), jobs in list(rows.items()):
            if jobs <= finished:
                text = table(name, output)
                (output / "tables" / f"{name}.md").write_text(text)
                print(f"\n{text}", flush=True)
                del rows[name, seed]

    run_jobs(list(plan.jobs.values()), output, options.parallel, write_tables)
    write_tables(plan.jobs.keys())


if __name__ == "__main__":
    main()
