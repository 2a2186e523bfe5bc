"""What the ranks of test_hybrids run beside training_jobs: logits of many models in one layout, saves, exports."""

import torch
from safetensors.torch import load_file


def logits(cases: list[dict], flags: list[str], result: str) -> None:
    """For each case {checkpoint, expected}: the largest error of the logits against those of a safetensors file with
    "tokens" and "logits", over all ranks."""
    import worker_models
    from layout import job

    found = {}
    for case in cases:
        expected = load_file(case["expected"])
        sizes = worker_models._sizes(expected["tokens"].shape)
        with job(case["checkpoint"], *_sizes_of(flags), *sizes, *flags) as started:
            of_model = worker_models._logits(started, expected["tokens"])
            found[case["checkpoint"]] = worker_models._compare(of_model, expected["logits"])
    if torch.distributed.get_rank() == 0:
        torch.save(found, result)


def save(cases: list[dict], flags: list[str]) -> None:
    """Each case {checkpoint, target} loaded and saved as the training loop does, in BF16."""
    import worker_models
    from layout import job

    for case in cases:
        sizes = ["--seq-length", "8", "--micro-batch-size", "1", "--global-batch-size", "8"]
        saving = ["--bf16", "--save", case["target"], "--save-interval", "1", "--qad-policy", "bf16"]
        with job(case["checkpoint"], *_sizes_of(flags), *sizes, *saving, *flags) as started:
            worker_models._save(started)


def export(exports: list[list[str]]) -> None:
    """[checkpoint, output, layout] each."""
    from megatron_qad.checkpoint.export_hf import export_hf
    from megatron_qad.engine.distributed import init_process_group

    init_process_group()
    for checkpoint, output, layout in exports:
        export_hf(checkpoint, output, layout)


def _sizes_of(flags: list[str]) -> tuple[int, int]:
    """Tensor- and pipeline-parallel size; they may stand a second time in ``flags``."""

    def of(flag: str) -> int:
        return int(flags[flags.index(flag) + 1]) if flag in flags else 1

    return of("--tensor-model-parallel-size"), of("--pipeline-model-parallel-size")


def weight_only(checkpoint: str, expected: str, flags: list[str], quantizes: bool, result: str) -> None:
    """Largest error of the logits of a job's float32 checkpoint, its weights put on the grid as a step would."""
    import worker_models
    from layout import job

    from megatron_qad.quantization.in_place_weights import InPlaceWeights

    wanted = load_file(expected)
    with job(checkpoint, 1, 1, *worker_models._sizes(wanted["tokens"].shape), *flags) as started:

        def quantized(teacher):
            if quantizes:
                InPlaceWeights(teacher.chunks, started.config.formats).quantize_()

        found = worker_models._logits(started, wanted["tokens"], quantized)
        torch.save(worker_models._compare(found, wanted["logits"]), result)
