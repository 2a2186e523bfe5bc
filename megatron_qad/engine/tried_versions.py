"""Other versions of the packages in the table of ``patches`` that were tried, and what broke with them.

``docs/patches.md`` shows the list. A test compares it with the ranges in ``pyproject.toml``.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class TriedVersion:
    """A version of a package other than the one for which the table of patches was written."""

    package: str
    """Distribution on PyPI."""
    version: str
    supported: bool
    """Whether the range in ``pyproject.toml`` contains the version. Then every row of the table must agree with it."""
    rows: str
    """Rows of the table whose source differs; "none" if all agree."""
    result: str
    """What was run, and what failed."""


_JOBS = "a Nemotron-H job with experts (TP2 x EP2: train, save, export, validate) and a Llama job that resumes"

TRIED: tuple[TriedVersion, ...] = (
    TriedVersion(
        "megatron-core",
        "0.19.0",
        supported=True,
        rows="none",
        result=f"nothing broke in {_JOBS}, and in experts that resume with other parallelism",
    ),
    TriedVersion(
        "megatron-core",
        "0.18.2",
        supported=False,
        rows="`get_forward_backward_func`, `train_step`, `save_checkpoint`, `dist_checkpointing.save`, "
        "`_set_main_param_and_optimizer_states`",
        result="no job was run; the sources were read. `dist_checkpointing.save` writes the state that ranks share to "
        "a file of its own; the others differ in arguments and process groups, the last one in its docstring",
    ),
    TriedVersion(
        "nvidia-modelopt",
        "0.46.1",
        supported=True,
        rows="none",
        result=f"nothing broke in {_JOBS}; codes and scales equal modelopt's. One test that compares is skipped: "
        "`NVFP4ActHeadroomCalibrator` is new in 0.47",
    ),
    TriedVersion(
        "torch",
        "2.12.1",
        supported=False,
        rows="`load`, `device_count`, `memory_stats`, `_engine_run_backward`, `reduce_scatter`",
        result="checkpoints were refused: torch 2.12 writes the plans of all ranks, which Megatron attaches, into "
        "`.metadata`, and 2.11 drops them. Their classes are accepted now, also from checkpoints of others. Then "
        f"nothing broke in {_JOBS}. Run with NCCL 2.29.7 and otherwise the CUDA libraries of 2.11, without a GPU",
    ),
    TriedVersion(
        "transformers",
        "5.15.1",
        supported=False,
        rows="none; its mapping has the entry, so from 5.15 on the row can go",
        result="274 tests of chats, generation, caches, families and exports: one timed out on the busy machine, and "
        "one shows a change. Nemotron-H's packed weights are found in the compressed-tensors layout, but it reports "
        "the experts' global scales as not read. The export makes transformers refuse it, with the reason of 5.14",
    ),
    TriedVersion(
        "transformers",
        "5.24.0",
        supported=False,
        rows="none by type; the mapping has neither `moe` nor `mlp`",
        result="`KeyError` where a local model generates (read in the source, fixed). Then generation with a hybrid "
        "and the caches pass. The test of Nemotron-H fails as in 5.15.1. Needs tokenizers 0.23. No other test was run",
    ),
)


def supported_versions(package: str) -> tuple[str, ...]:
    """Return the tried versions of a package that ``pyproject.toml`` allows."""
    return tuple(tried.version for tried in TRIED if tried.package == package and tried.supported)
