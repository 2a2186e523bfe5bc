"""Functions that the ranks of test_vision run, in addition to training_jobs."""

from pathlib import Path

import torch


def logits(checkpoint: str, inputs: str, result: str) -> None:
    """Save the teacher's logits for the rows and tiles in ``inputs``, in two microbatches."""
    from tiny_vision import IMAGE_TOKEN
    from worker_job import job

    from megatron_qad.training.batch import Batch
    from megatron_qad.training.image_features import ImageEncoder, MicrobatchImages
    from megatron_qad.training.models import build_teacher

    given = torch.load(inputs)
    tokens, tiles = given["tokens"], given["tiles"]
    rows, length = tokens.shape
    flags = ["--seq-length", f"{length}", "--micro-batch-size", f"{rows // 2}", "--global-batch-size", f"{rows}"]
    with job(checkpoint, 1, 1, *flags) as started:
        teacher = build_teacher(started.config, started.args, started.forward)
        model = started.config.student
        file = Path(checkpoint) / "hf" / "passthrough.safetensors"
        encoder = ImageEncoder(model.family.vision(model.hf), [file], torch.float32)
        batches, first = [], 0
        for part in tokens.split(rows // 2):
            is_image = part == IMAGE_TOKEN
            index = torch.where(is_image, is_image.flatten().cumsum(0).view_as(part) - 1, -1)
            count = int(is_image.sum()) // encoder.settings.tokens_per_tile
            images = MicrobatchImages(encoder, tiles[first : first + count], index) if count else None
            batches.append(Batch(part, torch.arange(length).expand(len(part), -1), images=images))
            first += count
        teacher.attach_outputs(batches, seq_length=length, micro_batch_size=rows // 2)
        torch.save(torch.cat([batch.teacher_output.logits() for batch in batches]), result)
