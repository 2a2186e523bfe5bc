"""What is trained: models, data, students, and the tables that compare them. ``run.py`` runs it.

Numbers of tables are those of the QAD report (arXiv:2601.20088).
"""

from dataclasses import dataclass

RATE = 1e-4
"""Learning rate of QAT and QAD where a table does not say another one."""

DATA = {
    "pretraining": ("pretraining_problems", "pretraining_text"),
    "sft": ("sft_sums", "sft_letters", "sft_language"),
    "steps": ("steps_sums", "steps_letters"),
    "both_stages": ("sft_sums", "sft_letters", "sft_language", "steps_sums", "steps_letters"),
    "sums": ("sft_sums",),
    "letters": ("sft_letters",),
    "noisy": ("noisy_sums", "noisy_letters", "noisy_language"),
    "heldout": ("heldout",),
    "heldout_answers": ("heldout_answers",),
}
"""Prepared data, and the files of ``make_inputs.py`` in each."""


@dataclass(frozen=True)
class Model:
    """A model in BF16 (here: float32) that is trained further from another one."""

    start: str
    """The model that training begins with; one of ``make_inputs.UNTRAINED`` is an untrained one."""
    data: str = ""
    """Of ``DATA``; empty: reinforcement learning."""
    steps: int = 0
    lr: float = 1e-3


MODELS = {
    "pretrained": Model("small", "pretraining", 1500, 2e-3),
    "sft": Model("pretrained", "sft", 300, 5e-4),
    "rl": Model("sft", steps=100, lr=1e-4),
    "two_stages": Model("sft", "steps", 200, 3e-4),
    "pretrained_large": Model("large", "pretraining", 1500, 1.5e-3),
    "sft_large": Model("pretrained_large", "sft", 300, 5e-4),
    "rl_large": Model("sft_large", steps=100, lr=1e-4),
    "pretrained_hybrid": Model("hybrid", "pretraining", 1500, 2e-3),
    "sft_hybrid": Model("pretrained_hybrid", "sft", 300, 5e-4),
    "rl_hybrid": Model("sft_hybrid", steps=100, lr=1e-4),
}


def is_hybrid(name: str) -> bool:
    """Return whether a model, a student or a run of either has layers of Mamba and of experts."""
    return name.split("/")[0].endswith("hybrid")


SAMPLES = {
    "generated": ("rl", "prompts"),
    "bos": ("rl", "bos"),
    "random": ("rl", "random"),
    "student": ("rl/ptq-1", "prompts"),
}
"""Generated data: the model that writes it, and from what. ``correct`` are the right answers of ``generated``."""


@dataclass(frozen=True)
class Student:
    """A quantized model."""

    teacher: str
    """The model of ``MODELS`` that is quantized, and by which the student is judged."""
    loss: str = ""
    """``--qad-loss``; empty: PTQ."""
    data: str = "sft"
    lr: float = RATE
    distilled_from: str = ""
    """The teacher in training, if it is another model."""
    policy: str = "policy.yaml"


_LOSSES = {"ptq": "", "qat": "ce", "qad": "kl"}
STUDENTS = {
    f"{teacher}/{name}": Student(teacher, loss, data)
    for teacher, data in {"rl": "sft", "two_stages": "both_stages", "sft": "sft"}.items()
    for name, loss in _LOSSES.items()
}
_HYBRID, _ALL_LAYERS = "policy_hybrid.yaml", "policy_all_layers.yaml"
STUDENTS |= {f"rl_hybrid/{name}": Student("rl_hybrid", loss, policy=_HYBRID) for name, loss in _LOSSES.items()}
STUDENTS |= {
    "rl_hybrid/qad-1e-05": Student("rl_hybrid", "kl", lr=1e-5, policy=_HYBRID),
    "rl_hybrid/ptq-all": Student("rl_hybrid", policy=_ALL_LAYERS),
    "rl_hybrid/qad-all": Student("rl_hybrid", "kl", policy=_ALL_LAYERS),
}
for data in ("sums", "letters", "noisy", "generated", "correct", "bos", "random", "student"):
    STUDENTS[f"rl/qad-{data}"] = Student("rl", "kl", data)
STUDENTS |= {f"rl/qad-{lr:g}": Student("rl", "kl", lr=lr) for lr in (1e-5, 3e-5, 1e-3)}
STUDENTS |= {
    "rl/qat-noisy": Student("rl", "ce", "noisy"),
    "rl/qad-mse": Student("rl", "mse"),
    "rl/qad-large": Student("rl", "kl", distilled_from="rl_large"),
}


@dataclass(frozen=True)
class Table:
    """Students side by side."""

    title: str
    paper: str
    """What the report found, printed above the table."""
    rows: dict[str, str]
    """Name of the row by model or student."""
    teacher: str = "rl"
    """The model in BF16 that the others are compared with."""
    student: str = "rl/qad"
    """The student that the others are compared with, too."""


_METHODS = {"": "BF16", "/ptq": "PTQ", "/qat": "QAT", "/qad": "QAD"}


def _methods(teacher: str) -> dict[str, str]:
    return {teacher + suffix: name for suffix, name in _METHODS.items()}


TABLES = {
    "rl": Table(
        "Tables 1 and 3: a model after reinforcement learning",
        "In the report: Super V1: KL 0.311 after QAT and 0.004 after QAD, cross entropy 0.408 and 0.416, "
        "BF16 0.408. Nemotron 3 "
        "Nano on AA-LCR: BF16 35.9, PTQ 31.3, QAT 24.8, QAD 34.3.",
        {"sft": "BF16 before reinforcement learning"} | _methods("rl"),
    ),
    "sft": Table(
        "Table 2: a model after two stages of SFT",
        "In the report: QAD is near BF16; QAT is between PTQ and QAD.",
        _methods("two_stages"),
        "two_stages",
        "two_stages/qad",
    ),
    "one_stage": Table(
        "Table 10: a model after one stage of SFT",
        "In the report: QAT is about as good as QAD.",
        _methods("sft"),
        "sft",
        "sft/qad",
    ),
    "domains": Table(
        "Table 4: data of some domains only",
        "In the report, AIME24, AIME25, LiveCodeBench: math only 71.0, 61.7, 53.1; code only 71.0, 62.0, "
        "53.3; both 71.7, 62.0, "
        "53.3; PTQ 69.4, 58.7, 52.0.",
        {"rl": "BF16", "rl/ptq": "PTQ", "rl/qad-sums": "sums only", "rl/qad-letters": "letters only", "rl/qad": "all"},
    ),
    "data": Table(
        "Tables 5 and 11: sources of data",
        "In the report, AIME24, AIME25, LiveCodeBench: SFT 71.7, 62.0, 53.3; generated from RL prompts "
        "71.9, 61.3, 52.6; correct "
        "only 70.5, 61.6, 52.3; from BOS 70.1, 60.9, 52.4; random tokens 68.6, 60.0, 51.7; PTQ 69.4, 58.7, 52.0; "
        "BF16 73.0, 63.5, 54.3.",
        {
            "rl": "BF16",
            "rl/ptq": "PTQ",
            "rl/qad": "SFT",
            "rl/qad-generated": "generated from RL prompts",
            "rl/qad-correct": "generated, correct only",
            "rl/qad-bos": "generated from BOS",
            "rl/qad-random": "random tokens",
        },
    ),
    "on_policy": Table(
        "The student's answers against the teacher's",
        "Not in the report.",
        {"rl": "BF16", "rl/ptq": "PTQ", "rl/qad-generated": "the teacher's answers", "rl/qad-student": "PTQ's answers"},
        student="rl/qad-generated",
    ),
    "learning_rates": Table(
        "Tables 6 and 7: learning rates",
        "In the report: AceReason: 1e-6 to 1e-4 all work. Nano 9B V2: 1e-6 is best, 1e-4 is worst.",
        {
            "rl": "BF16",
            "rl/ptq": "PTQ",
            "rl/qad-1e-05": "1e-5",
            "rl/qad-3e-05": "3e-5",
            "rl/qad": "1e-4",
            "rl/qad-0.001": "1e-3",
        },
    ),
    "losses": Table(
        "Table 8: KL or mean squared error of the logits",
        "In the report: Nano 9B V2 on GPQA-D: KL 62.7, MSE 60.3.",
        {"rl": "BF16", "rl/ptq": "PTQ", "rl/qad": "KL", "rl/qad-mse": "MSE"},
    ),
    "teachers": Table(
        "Table 9: a larger teacher",
        "In the report: Nano 9B V2: its own BF16 model as the teacher 80.4, 71.5, 67.8; the 12B model "
        "80.2, 69.8, 66.7.",
        {
            "rl": "BF16",
            "rl_large": "BF16, larger",
            "rl/ptq": "PTQ",
            "rl/qad": "its own teacher",
            "rl/qad-large": "larger teacher",
        },
    ),
    "hybrid": Table(
        "Table 3 with a hybrid of Mamba, attention and experts, after reinforcement learning",
        "In the report, Nemotron 3 Nano on AA-LCR: BF16 35.9, PTQ 31.3, QAT 24.8, QAD 34.3.",
        {"sft_hybrid": "BF16 before reinforcement learning"}
        | _methods("rl_hybrid")
        | {"rl_hybrid/qad-1e-05": "QAD at 1e-5"}
        | {"rl_hybrid/ptq-all": "PTQ, all layers", "rl_hybrid/qad-all": "QAD, all layers"},
        "rl_hybrid",
        "rl_hybrid/qad",
    ),
    "noise": Table(
        "Label noise: the answers of one chat in ten exchanged",
        "Not a table of the report.",
        {
            "rl": "BF16",
            "rl/ptq": "PTQ",
            "rl/qat": "QAT",
            "rl/qat-noisy": "QAT, noise",
            "rl/qad": "QAD",
            "rl/qad-noisy": "QAD, noise",
        },
    ),
}
