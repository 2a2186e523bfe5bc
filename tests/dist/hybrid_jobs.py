"""Jobs of test_hybrids other than training: logits of many models with one parallelism, saves and exports."""

import torch
from safetensors.torch import load_file


def logits(cases: list[dict], flags: list[str], result: str) -> None:
    """Save the largest logit error over all ranks for each case {checkpoint, expected}.

    ``expected`` is a safetensors file with "tokens" and "logits".
    """
    import worker_models
    from worker_job import job

    errors = {}
    for case in cases:
        expected = load_file(case["expected"])
        sizes = worker_models._sizes(expected["tokens"].shape)
        with job(case["checkpoint"], *_sizes_of(flags), *sizes, *flags) as started:
            actual = worker_models._logits(started, expected["tokens"])
            errors[case["checkpoint"]] = worker_models._compare(actual, expected["logits"])
    if torch.distributed.get_rank() == 0:
        torch.save(errors, result)


def save(cases: list[dict], flags: list[str]) -> None:
    """Load and save each case {checkpoint, target} in BF16 as the training loop does."""
    import worker_models
    from worker_job import job

    for case in cases:
        sizes = ["--seq-length", "8", "--micro-batch-size", "1", "--global-batch-size", "8"]
        saving = ["--bf16", "--save", case["target"], "--save-interval", "1", "--qad-policy", "bf16"]
        with job(case["checkpoint"], *_sizes_of(flags), *sizes, *saving, *flags) as started:
            worker_models._save(started)


def export(exports: list[list[str]]) -> None:
    """Export each [checkpoint, output, export layout]."""
    from megatron_qad.checkpoint.export_hf import export_hf
    from megatron_qad.engine.distributed import init_process_group

    init_process_group()
    for checkpoint, output, layout in exports:
        export_hf(checkpoint, output, layout)


def _sizes_of(flags: list[str]) -> tuple[int, int]:
    """Return the tensor- and pipeline-parallel sizes in ``flags``, where they may appear again."""

    def size(flag: str) -> int:
        return int(flags[flags.index(flag) + 1]) if flag in flags else 1

    return size("--tensor-model-parallel-size"), size("--pipeline-model-parallel-size")


def weight_only(checkpoint: str, expected: str, flags: list[str], quantizes: bool, result: str) -> None:
    """Save the largest logit error of a job's float32 checkpoint, with weights quantized as in a training step."""
    import worker_models
    from worker_job import job

    from megatron_qad.quantization.in_place_weights import InPlaceWeights

    reference = load_file(expected)
    with job(checkpoint, 1, 1, *worker_models._sizes(reference["tokens"].shape), *flags) as started:

        def quantize(teacher):
            if quantizes:
                InPlaceWeights(teacher.chunks, started.config.formats).quantize_()

        actual = worker_models._logits(started, reference["tokens"], quantize)
        torch.save(worker_models._compare(actual, reference["logits"]), result)
