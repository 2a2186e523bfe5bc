"""Fixtures: event files and tiny checkpoints, written in one process."""

import json
import os

import pytest

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from megatron_qad.engine import init_runtime  # noqa: E402

init_runtime()  # before megatron is imported

import torch  # noqa: E402
from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing import ShardedTensor  # noqa: E402
from torch.utils.tensorboard import SummaryWriter  # noqa: E402

from megatron_qad.checkpoint.import_hf import import_hf  # noqa: E402
from megatron_qad.engine.distributed import init_process_group  # noqa: E402
from megatron_qad.engine.run_directory import manifest  # noqa: E402
from megatron_qad.models.families import family_of  # noqa: E402

METRICS = ("kl_to_teacher", "cross_entropy", "teacher_cross_entropy", "top1_agreement", "num_tokens")


@pytest.fixture(autouse=True)
def process_group():
    """A process group of one process: checkpoints are read and written through torch.distributed."""
    init_process_group()


@pytest.fixture
def write_events():
    """write_events(directory, {name: [(step, value), ...]}): write one event file, as one start of a job does."""

    def write(directory, scalars):
        writer = SummaryWriter(str(directory), filename_suffix=f".{len(list(directory.glob('*')))}")
        for name, curve in scalars.items():
            for step, value in curve:
                writer.add_scalar(name, value, step)
        writer.close()

    return write


@pytest.fixture
def evaluations():
    """evaluations({step: (kl, ce, teacher_ce, top1, tokens)}): the scalars as callbacks.validation writes them."""

    def scalars(by_step):
        return {
            f"validation/{metric}": [(step, values[i]) for step, values in by_step.items()]
            for i, metric in enumerate(METRICS)
        }

    return scalars


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """Checkpoint of a tiny random Llama, imported as BF16; hf.pt in its parent has the Hugging Face weights."""
    import transformers

    init_process_group()
    directory = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        vocab_size=120,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory / "source")
    torch.save(model.state_dict(), directory / "hf.pt")
    import_hf(directory / "source", directory / "checkpoint")
    return directory / "checkpoint"


@pytest.fixture
def formats(teacher):
    """Formats of the policy nvfp4-all-linear for the tiny model: every linear except the head."""
    config = json.loads((teacher / "hf" / "config.json").read_text())
    linears = family_of(config).linears(config)
    return {m.megatron: "bf16" if m.kind == "head" else "nvfp4" for m in linears}


@pytest.fixture
def save_checkpoint():
    """save_checkpoint(directory, iteration, tensors): save a torch_dist checkpoint with Megatron's own writer.

    The manifest is added here: jobs install the writer that adds it, and import_hf writes its files without Megatron's.
    """

    def save(directory, iteration, tensors):
        target = directory / f"iter_{iteration:07d}"
        target.mkdir(parents=True)
        sharded = {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in tensors.items()}
        dist_checkpointing.save(sharded, str(target))
        manifest.write_manifest(target)
        (directory / "latest_checkpointed_iteration.txt").write_text(str(iteration))

    return save
