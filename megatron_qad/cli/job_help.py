"""The help of ``megatron-qad train``: all of QAD's flags, and those of Megatron's 800 that a job usually needs."""

import ast
import inspect
import textwrap
from collections.abc import Mapping

from megatron_qad.config.qad_options import QADOptions

MEGATRON_FLAGS: Mapping[str, Mapping[str, str]] = {
    "files": {
        "--config FILE": "YAML file with flags, without --; may be repeated. The command line wins.",
        "--train-data-path PREFIX": "Training data of megatron-qad prepare; 'WEIGHT PREFIX WEIGHT PREFIX' blends.",
        "--valid-data-path PREFIX": "Validation data.",
        "--save DIR": "Directory of the run: checkpoints, logs, records. The same command again resumes from it.",
        "--tensorboard-dir DIR": "TensorBoard events.",
    },
    "parallelism": {
        "--tensor-model-parallel-size N": "GPUs that share each layer; with --sequence-parallel also the activations.",
        "--pipeline-model-parallel-size N": "Stages of layers.",
        "--context-parallel-size N": "GPUs that share each sequence.",
        "--expert-model-parallel-size N": "GPUs that share the experts.",
        "--use-distributed-optimizer": "Shard the optimizer over data-parallel ranks.",
        "--recompute-granularity full|selective": "Compute activations again in the backward pass, to save memory.",
    },
    "training": {
        "--bf16": "Compute in bfloat16, with float32 master weights.",
        "--seq-length N": "Tokens in a row.",
        "--micro-batch-size N": "Rows of a forward pass on a GPU.",
        "--global-batch-size N": "Rows of a step.",
        "--train-iters N": "Steps.",
        "--lr X": "Largest learning rate; see docs/howto/choose_a_learning_rate.md.",
        "--min-lr X": "Smallest learning rate.",
        "--lr-warmup-iters N": "Steps of linear warm-up.",
        "--eval-interval N": "Steps between validations.",
        "--save-interval N": "Steps between checkpoints.",
        "--dataloader-inter-document-masking": "Pack several documents into a row; each attends to itself only.",
    },
}
"""Flags of Megatron by heading, with what they do here."""


def print_flags(command: str) -> None:
    """Print the short help. Imports neither torch nor Megatron."""
    print(f"usage: megatron-qad {command} --qad-teacher CKPT --train-data-path DATA --save RUN [FLAGS]\n")
    print("Megatron's flags that a job usually needs (--help-all lists all):")
    for heading, flags in MEGATRON_FLAGS.items():
        print(f"\n  {heading}")
        for flag, text in flags.items():
            _print_flag(flag, text)
    print("\nFlags of quantization-aware distillation:\n")
    for flag, text in qad_flags().items():
        _print_flag(flag, text)


def print_all_flags() -> None:
    """Print the help of Megatron's own parser with our flags."""
    from megatron_qad.engine import init_runtime

    init_runtime(for_compute=True)
    from megatron_qad.engine.megatron_args import make_parser

    make_parser(QADOptions).print_help()


def qad_flags() -> dict[str, str]:
    """Return the text of each flag of ``QADOptions``: the docstring that follows its field."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(QADOptions))).body
    texts = {}
    for field, following in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(following, ast.Expr):
            flag = f"--{field.target.id.replace('_', '-')}"
            texts[flag] = " ".join(following.value.value.split()).replace("%%", "%")
    return texts


def _print_flag(flag: str, text: str) -> None:
    print(f"  {flag}")
    print(textwrap.fill(text, width=110, initial_indent=" " * 6, subsequent_indent=" " * 6))
