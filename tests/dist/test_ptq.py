"""PTQ jobs, with the whole model and layer by layer, against a training job at learning rate 0."""

from pathlib import Path

import pytest
import tiny_hybrids
import tiny_job
import torch
from fork_server import ForkServer

from megatron_qad.engine.run_directory import json_records, manifest

MODELS = {
    "dense": tiny_job.LLAMA | {"tie_word_embeddings": True, "torch_dtype": "bfloat16"},
    "hybrid": tiny_hybrids.NEMOTRON_H | {"torch_dtype": "bfloat16"},
}
FLAGS = {
    "dense": ["--qad-policy-override", "attention=fp8", "--qad-weight-scale-rule", "four_over_six"],
    # Few samples, so that some experts take the amax of another one; keys and values are quantized, too.
    "hybrid": [
        *("--qad-policy", "nemotron-3-nano-30b-a3b", "--qad-policy-override", "mlp=nvfp4", "head=nvfp4"),
        *("--qad-calibration-samples", "2"),
    ],
}
VOCAB = 120
UNTRAINED = ["--train-iters", "1", "--lr", "0", "--min-lr", "0", "--no-save-optim"]


class Shop:
    """Models and data of the jobs in this file, and the server that runs them."""

    def __init__(self, directory: Path, server: ForkServer):
        self.directory, self.server = directory, server

    def argv(self, model: str, *flags: str) -> list[str]:
        where = self.directory
        return [
            *("--qad-teacher", f"{where}/{model}_teacher", "--qad-student", f"{where}/{model}_student", "--bf16"),
            *("--data-path", f"{where}/data", "--data-cache-path", f"{where}/cache", "--split", "80,20,0"),
            *("--seq-length", "32", "--micro-batch-size", "2", "--global-batch-size", "8", "--eval-iters", "2"),
            *("--qad-calibration-samples", "16", *tiny_job.READ_HERE, *FLAGS[model], *flags),
        ]

    def run(self, argv: list[str], nproc: int = 1, **more) -> str:
        return self.server.run("training_jobs:train", nproc, {"argv": argv}, **more)

    def tensors(self, *runs: Path) -> list[dict[str, torch.Tensor]]:
        result = self.directory / "tensors.pt"
        self.server.run("ptq_jobs:tensors", 1, {"checkpoints": list(map(str, runs)), "result": str(result)})
        return torch.load(result)

    def exported(self, run: Path) -> dict[str, manifest.Sum]:
        """Export a run in both packed layouts. Returns the sums of all files with weights and configs."""
        sums = {}
        outputs = {layout: f"{run}-{layout}" for layout in ("modelopt", "compressed-tensors")}
        if not Path(outputs["modelopt"]).exists():  # exported for an earlier test
            self.server.run("training_jobs:export_checkpoint", 1, {"checkpoint": str(run), "outputs": outputs})
        for layout, output in outputs.items():
            names = [name for name in manifest.files_in(Path(output)) if name != "qad_export.json"]
            sums |= {f"{layout}/{name}": value for name, value in manifest.sums_of(Path(output), names).items()}
        return sums


@pytest.fixture(scope="module")
def shop(tmp_path_factory, server) -> Shop:
    directory = tmp_path_factory.mktemp("ptq")
    models = []
    for model, config in MODELS.items():
        for role, noise in (("teacher", 0.0), ("student", 0.1)):
            source = tiny_job.write_hf(directory / f"hf_{model}_{role}", config, noise=noise, dtype=torch.bfloat16)
            models.append((str(source), f"{directory}/{model}_{role}", "bfloat16"))
    tiny_job.write_data(directory / "data", vocab_size=VOCAB)
    server.run("training_jobs:import_checkpoints", 1, {"models": models})
    return Shop(directory, server)


@pytest.fixture(scope="module")
def untrained(shop) -> dict[str, tuple[Path, str]]:
    """For each model the directory and output of a training job of one step at learning rate 0."""
    jobs = {}
    for model in MODELS:
        run = shop.directory / f"{model}-untrained"
        jobs[model] = run, shop.run(shop.argv(model, *UNTRAINED, "--save", str(run)))
    return jobs


@pytest.fixture(scope="module")
def whole(shop) -> dict[str, tuple[Path, str]]:
    """For each model the directory and output of its PTQ job with the whole model in memory."""
    jobs = {}
    for model in MODELS:
        run = shop.directory / f"{model}-whole"
        jobs[model] = run, shop.run(shop.argv(model, "--qad-ptq", "--save", str(run)))
    return jobs


def assert_same_tensors(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for tensors in (left, right):  # without the padding of the vocabulary, whose values have no meaning
        vocabulary = ("embedding.word_embeddings.weight", "output_layer.weight")
        tensors |= {name: tensors[name][:VOCAB] for name in vocabulary if name in tensors}
    different = [name for name in left if left[name].dtype != right[name].dtype or not left[name].equal(right[name])]
    assert not different


def validation(output: str) -> str:
    (line,) = {line for line in output.splitlines() if "megatron_qad validation at iteration 1" in line}
    return line


@pytest.mark.parametrize("model", MODELS)
def test_checkpoint_equals_that_of_an_untrained_job(shop, untrained, whole, model):
    """The same files, tensors, amaxes, reports and validation as a training job whose only step changes nothing."""
    (old, old_output), (new, new_output) = untrained[model], whole[model]
    assert_same_tensors(*shop.tensors(old, new))
    assert sorted(f.name for f in old.iterdir()) == sorted(f.name for f in new.iterdir())
    assert manifest.files_in(old / "iter_0000001") == manifest.files_in(new / "iter_0000001")
    assert validation(old_output) == validation(new_output)
    for name in ("calibration.json", "best_checkpoints.json"):
        assert json_records.read(old / name) == json_records.read(new / name)
    assert shop.exported(old) == shop.exported(new)


def test_nothing_can_be_trained(shop, tmp_path):
    result = str(tmp_path / "state")
    argv = shop.argv("dense", "--qad-ptq", "--use-distributed-optimizer")
    shop.server.run("ptq_jobs:state", 1, {"argv": argv, "result": result})
    found = torch.load(result)
    assert found.pop("parameters") > 10
    assert found == {"trained": 0, "wrapped": False, "is_training": False, "has_teacher": True}


@pytest.mark.parametrize("model", MODELS)
def test_sequential_equals_whole(shop, whole, model, tmp_path):
    """Layer by layer: the same tensors, amaxes, records, validation and exports as with the whole model in memory."""
    run, (expected, expected_output) = tmp_path / "run", whole[model]
    output = shop.run(shop.argv(model, "--qad-ptq", "--qad-ptq-sequential", "--save", str(run)))
    assert_same_tensors(*shop.tensors(expected, run))
    assert validation(output) == validation(expected_output)
    for name in ("calibration.json", "best_checkpoints.json", "qad.json"):
        assert json_records.read(run / name) == json_records.read(expected / name)
    assert shop.exported(run) == shop.exported(expected)
