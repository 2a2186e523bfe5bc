"""PTQ jobs, with the whole model and layer by layer, against a training job at learning rate 0."""

import shutil
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
    "dense": ["--qad-policy-override", "attention=fp8", "mlp=nvfp4:frozen", "--qad-weight-scale-rule", "four_over_six"],
    "float32": [],
    # Few samples, so that some experts take the amax of another one; keys and values are quantized, too. Checkpoints
    # carry scales of single weights, of experts and of Mamba layers.
    "hybrid": [
        *("--qad-policy", "nemotron-3-nano-30b-a3b", "--qad-policy-override", "mlp=nvfp4:mse_sweep"),
        *("head=nvfp4:frozen", "expert=nvfp4:four_over_six:frozen", "mamba=nvfp4:frozen"),
        *("--qad-calibration-samples", "2", "--qad-fused-linear-loss", "always"),
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
            if model == "dense":
                models.append((str(source), f"{directory}/float32_{role}", "float32"))
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
    assert json_records.read(old / "best_checkpoints.json") == json_records.read(new / "best_checkpoints.json")
    assert shop.exported(old) == shop.exported(new)


def test_nothing_can_be_trained(shop, tmp_path):
    result = str(tmp_path / "state")
    argv = shop.argv("dense", "--qad-ptq", "--use-distributed-optimizer")
    shop.server.run("ptq_jobs:state", 1, {"argv": argv, "result": result})
    found = torch.load(result)
    assert found.pop("parameters") > 10
    assert found == {"trained": 0, "wrapped": False, "is_training": False, "has_teacher": True}


def test_virtual_stages_have_the_same_amaxes(shop, whole, tmp_path):
    run = tmp_path / "run"
    flags = ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"]
    output = shop.run(shop.argv("dense", "--qad-ptq", *flags, "--save", str(run)), nproc=2)
    assert_same_tensors(*shop.tensors(whole["dense"][0], run))
    assert validation(output)


def test_dry_run_counts_no_training_state(shop):
    plans = [shop.run(shop.argv("dense", *flags, "--qad-dry-run")) for flags in (UNTRAINED, ["--qad-ptq"])]
    rows = {"\n  gradients ": True, "\n  optimizer state ": True, "nothing is trained": False}
    for text, is_in_training in rows.items():
        assert [text in plan for plan in plans] == [is_in_training, not is_in_training]


@pytest.mark.parametrize("model", MODELS)
def test_sequential_equals_whole(shop, whole, model, tmp_path):
    """Layer by layer: the same tensors, amaxes, records, validation and exports as with the whole model in memory."""
    run, (expected, expected_output) = tmp_path / "run", whole[model]
    output = shop.run(shop.argv(model, "--qad-ptq", "--qad-ptq-sequential", "--save", str(run)))
    assert_same_tensors(*shop.tensors(expected, run))
    assert validation(output) == validation(expected_output)
    for name in ("best_checkpoints.json", "qad.json"):
        assert json_records.read(run / name) == json_records.read(expected / name)
    assert shop.exported(run) == shop.exported(expected)


def test_sequential_divides_the_sequences_over_ranks(shop, tmp_path):
    """With data parallelism and packed rows, in float32: as with the whole model on the same ranks."""
    outputs, runs = [], [tmp_path / "whole", tmp_path / "sequential"]
    for run, flags in zip(runs, ([], ["--qad-ptq-sequential"]), strict=True):
        packed = ["--dataloader-inter-document-masking", "--qad-calibration-percentile", "99.9"]
        argv = shop.argv("float32", "--qad-ptq", *packed, *flags, "--save", str(run))
        argv.remove("--bf16")
        outputs.append(shop.run(argv, nproc=2))
    assert_same_tensors(*shop.tensors(*runs))
    assert validation(outputs[0]) == validation(outputs[1])


def test_sequential_checkpoint_shares_the_weights(shop, tmp_path):
    """Its files are links; a damaged link is detected, and the run can be exported without its source."""
    run, source = tmp_path / "run", tmp_path / "source"
    shutil.copytree(shop.directory / "dense_student", source)
    flags = ["--qad-ptq", "--qad-ptq-sequential", "--eval-iters", "0", "--save", str(run)]
    output = shop.run(shop.argv("dense", *flags, "--qad-student", str(source)))
    assert "validation at iteration" not in output
    linked = sorted((run / "iter_0000001").glob("weights*"))
    assert linked and all(file.stat().st_nlink == 2 for file in linked)
    shutil.rmtree(source)
    assert shop.exported(run)
    output = shop.run(shop.argv("dense", "--load", str(run), "--skip-train", "--train-iters", "1"), fails=True)
    assert "Start from it with --qad-student" in output and "Traceback" not in output
    shop.run(shop.argv("dense", "--qad-ptq", "--qad-student", str(run)))
    data = bytearray(linked[0].read_bytes())
    data[len(data) // 2] ^= 1
    linked[0].write_bytes(data)
    error = shop.server.run("ptq_jobs:tensors", 1, {"checkpoints": [str(run)], "result": "none"}, fails=True)
    assert f"iter_0000001/{linked[0].name} has a different SHA-256" in error


def test_sequential_refusals(shop, tmp_path):
    for flags, nproc, message in (
        (["--qad-ptq", "--tensor-model-parallel-size", "2"], 2, "--tensor-model-parallel-size 2: "),
        (["--qad-ptq", "--context-parallel-size", "2"], 2, "--context-parallel-size 2: "),
        ([], 1, "training cannot. Add --qad-ptq."),
    ):
        output = shop.run(shop.argv("dense", "--qad-ptq-sequential", *flags), nproc, fails=True)
        assert message in output and "Traceback" not in output
    argv = shop.argv("dense", "--qad-ptq", "--qad-ptq-sequential", "--save", str(tmp_path / "run"))
    argv[argv.index("--qad-student") + 1] = f"{shop.directory}/float32_student"
    output = shop.run(argv, fails=True)
    assert "float32, but the job computes in torch.bfloat16. --qad-ptq-sequential keeps the stored weights" in output
    assert "Traceback" not in output and not list((tmp_path / "run").glob("iter_*"))


def test_sequential_without_calibration_or_teacher(shop, tmp_path):
    """Only weights are quantized, and the loss needs no teacher: the run has the weights and no amax."""
    outputs, runs = [], [tmp_path / "whole", tmp_path / "sequential"]
    for run, flags in zip(runs, ([], ["--qad-ptq-sequential"]), strict=True):
        flags = ["--qad-policy", "w4a16-all-linear", "--qad-loss", "ce", *flags, "--save", str(run)]
        argv = shop.argv("dense", "--qad-ptq", *flags)
        overrides = ("--qad-policy-override", "attention=fp8", "mlp=nvfp4:frozen")
        argv = [x for x in argv[2:] if x not in overrides]  # no --qad-teacher
        outputs.append(shop.run(argv))
    whole, sequential = shop.tensors(*runs)
    assert not any("_amax" in name for name in sequential)
    assert_same_tensors(whole, sequential)
    assert validation(outputs[0]) == validation(outputs[1])
    assert shop.exported(runs[0]) == shop.exported(runs[1])
