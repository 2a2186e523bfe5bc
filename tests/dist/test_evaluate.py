"""tools/evaluate.py on tiny models: agreement with the job's own validation, and of exports with their checkpoint."""

import shlex
import subprocess
import sys

import numpy as np
import pytest
import tiny_job
from launch import ROOT, environment
from tiny_hybrids import NEMOTRON_H, QWEN3_MOE

from megatron_qad.engine.run_directory import json_records
from megatron_qad.engine.run_directory.run_files import EXPORT_FILE
from megatron_qad.evaluation import record

LLAMA = tiny_job.LLAMA
PARALLELISM = {
    "tp1": (1, ()),
    "tp2": (2, ("--tensor-model-parallel-size", "2", "--sequence-parallel")),
    "pp2": (2, ("--pipeline-model-parallel-size", "2")),
    "cp2": (2, ("--context-parallel-size", "2")),
    "dp2": (2, ()),
}


class Shop:
    """A teacher and a PTQ run of a model, and its exports."""

    def __init__(self, directory, server, config, policy):
        self.directory, self._server = directory, server
        tiny_job.write_hf(directory / "hf", config)
        tiny_job.write_data(directory / "data", vocab_size=config["vocab_size"])
        models = [(str(directory / "hf"), str(directory / "teacher"), "bfloat16")]
        server.run("training_jobs:import_checkpoints", 1, {"models": models})
        self.flags = [
            *("--qad-teacher", f"{directory}/teacher", "--data-path", f"{directory}/data"),
            *("--data-cache-path", f"{directory}/cache", "--split", "50,50,0", "--bf16", "--seq-length", "32"),
            *("--micro-batch-size", "2", "--global-batch-size", "8", *tiny_job.READ_HERE),
        ]
        self.run = directory / "run"
        self.log = self.train("--save", str(self.run), "--qad-ptq", *policy)

    def train(self, *flags):
        return self._server.run("training_jobs:train", 1, {"argv": [*self.flags, *flags]})

    def export(self, *layouts):
        outputs = {layout: str(self.directory / layout) for layout in layouts}
        self._server.run("training_jobs:export_checkpoint", 1, {"checkpoint": str(self.run), "outputs": outputs})

    def evaluate(self, model, name="record", parallelism="tp1", *flags, **more):
        nproc, parallel = PARALLELISM[parallelism]
        output = self.directory / "records" / f"{name}-{parallelism}"
        argv = ["--model", str(model), "--output", str(output), *self.flags, *parallel, *flags]
        self.log = self._server.run("training_jobs:tool", nproc, {"name": "evaluate", "argv": argv}, **more)
        return self.log if more.get("fails") else record.load(output)


@pytest.fixture(scope="module")
def llama(tmp_path_factory, server):
    rules = ("head=nvfp4", "mlp=fp8", "kv_cache=fp8")
    policy = ("--qad-weight-scale-rule", "four_over_six", "--qad-policy-override", *rules)
    shop = Shop(tmp_path_factory.mktemp("llama"), server, LLAMA | {"dtype": "bfloat16"}, policy)
    shop.own = shop.evaluate(shop.run)
    return shop


def assert_same(actual: record.Evaluation, expected: record.Evaluation):
    assert np.array_equal(actual.rows, expected.rows)
    for name, values in expected.tokens.items():
        assert np.array_equal(actual.tokens[name], values), name


def test_agrees_with_the_validation_of_the_job(llama):
    (validated,) = json_records.read(llama.run / "best_checkpoints.json")
    about = llama.own.about
    assert about["tokens_sha256"] == validated["tokens_sha256"]
    assert about["num_tokens"] == validated["num_tokens"] == len(llama.own.tokens["row"])
    # Sums in float64 of the same float32 values, in another order.
    assert about["means"]["kl_to_teacher"] == pytest.approx(validated["kl_to_teacher"], rel=1e-12)
    assert about["means"]["kl_to_teacher"] > 0.01
    assert "the run's own validation of this iteration: KL" in llama.log
    assert about["formats"] == "5 nvfp4, 4 fp8, KV cache fp8"


def test_agrees_with_every_validation_of_a_training(llama):
    """The checkpoint of iteration 2 holds quantized weights, and is not the newest."""
    run = llama.directory / "trained"
    schedule = ("--train-iters", "4", "--lr", "1e-3", "--eval-interval", "2", "--save-interval", "2")
    llama.train("--save", str(run), *schedule, "--qad-calibration-samples", "8")
    validated = {
        entry["iteration"]: entry["kl_to_teacher"] for entry in json_records.read(run / "best_checkpoints.json")
    }
    assert set(validated) == {2, 4}
    second = llama.evaluate(run, "trained", "tp1", "--iteration", "2").about
    assert second["iteration"] == 2 and second["formats"] == "8 nvfp4, 1 bf16"
    assert second["means"]["kl_to_teacher"] == pytest.approx(validated[2], rel=1e-12)
    assert validated[2] != pytest.approx(validated[4], rel=1e-3)


def test_tokens_are_those_of_the_rows(llama):
    tokens, rows = llama.own.tokens, llama.own.rows
    inside = tokens["column"] + 1 < rows.shape[1]
    following = rows[tokens["row"][inside], tokens["column"][inside] + 1]
    assert np.array_equal(tokens["label"][inside], following)
    assert np.array_equal(tokens["position"], tokens["column"])
    places = tokens["row"].astype(np.int64) * rows.shape[1] + tokens["column"]
    assert (np.diff(places) > 0).all()


def test_exports_equal_their_checkpoint(llama):
    """Equal bit for bit: the same weights, scales and arithmetic."""
    llama.export("modelopt", "compressed-tensors")
    for layout in ("modelopt", "compressed-tensors"):
        exported = llama.evaluate(llama.directory / layout, layout)
        assert exported.about["formats"] == llama.own.about["formats"]
        assert_same(exported, llama.own)


@pytest.mark.parametrize("source", ["teacher", "hf"])
def test_teacher_has_no_divergence(llama, source):
    """Neither as the imported checkpoint nor as the Hugging Face model, whose float32 weights are rounded alike."""
    own = llama.evaluate(llama.directory / source, source)
    means = own.about["means"]
    assert means["kl_to_teacher"] == 0 and means["top1_agreement"] == means["top5_agreement"] == 1
    assert means["cross_entropy"] == means["teacher_cross_entropy"] > 0
    assert own.about["formats"] == "9 bf16"
    assert means["teacher_entropy"] == llama.own.about["means"]["teacher_entropy"]


@pytest.mark.all
@pytest.mark.parametrize("parallelism", ["tp2", "pp2", "cp2", "dp2"])
def test_parallelism_keeps_tokens_and_equality(llama, parallelism):
    """Tensor parallelism adds in another order in BF16, which changes last bits and so the codes of inputs."""
    if not (llama.directory / "modelopt").exists():
        llama.export("modelopt")
    own = llama.evaluate(llama.run, "run", parallelism)
    assert_same(llama.evaluate(llama.directory / "modelopt", "export", parallelism), own)
    if parallelism != "tp2":
        assert_same(own, llama.own)
    for array in ("row", "column", "position", "label"):
        assert np.array_equal(own.tokens[array], llama.own.tokens[array])
    kl = llama.own.about["means"]["kl_to_teacher"]
    assert own.about["means"]["kl_to_teacher"] == pytest.approx(kl, rel=0.1)


FROZEN = ("mlp=nvfp4:mse:frozen", "attention=nvfp4:mse:frozen")
OTHERS = {
    "experts": (QWEN3_MOE, ()),
    "hybrid": (NEMOTRON_H, ("--qad-policy-override", "kv_cache=fp8")),
    "frozen": (LLAMA, ("--qad-ptq-sequential", "--qad-policy-override", *FROZEN)),
}


@pytest.mark.all
@pytest.mark.parametrize("case", OTHERS)
def test_exports_of_other_models_equal_their_checkpoint(tmp_path, server, case):
    """The weights of the frozen case share the files of the import, which has gate and up as one tensor."""
    config, policy = OTHERS[case]
    shop = Shop(tmp_path, server, config | {"torch_dtype": "bfloat16"}, policy)
    own = shop.evaluate(shop.run)
    (validated,) = json_records.read(shop.run / "best_checkpoints.json")
    assert own.about["means"]["kl_to_teacher"] == pytest.approx(validated["kl_to_teacher"], rel=1e-12)
    shop.export("modelopt", "compressed-tensors")
    for layout in ("modelopt", "compressed-tensors"):
        assert_same(shop.evaluate(shop.directory / layout, layout), own)


@pytest.mark.all
def test_unpacked_export_has_quantized_weights_only(llama):
    llama.export("bf16")
    plain = llama.evaluate(llama.directory / "bf16", "bf16").about
    assert plain["formats"] == "9 bf16"
    assert 0 < plain["means"]["kl_to_teacher"] < llama.own.about["means"]["kl_to_teacher"]


@pytest.mark.all
def test_selection_by_kl_and_by_a_command_on_exports(llama, server):
    """Both evaluate the kept checkpoints of one run on other text, once by torchrun and once from exports."""
    run, output = llama.directory / "selected", llama.directory / "selection"
    schedule = ("--train-iters", "4", "--lr", "1e-3", "--eval-interval", "2", "--save-interval", "2")
    llama.train("--save", str(run), *schedule, "--qad-keep-best", "2")
    flags = [*llama.flags, "--split", "70,30,0", "--data-cache-path", str(output / "cache")]

    def select(directory, *argv):
        command = [sys.executable, str(ROOT / "tools" / "select_checkpoint.py"), "--run", str(run), *argv]
        command += ["--output", str(directory)]
        more = environment() | {"NPROC_PER_NODE": "1"}
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=more, cwd=ROOT
        )
        assert result.returncode == 0, result.stdout
        return json_records.read(directory / "selection.json")

    by_kl = select(output / "kl", *flags)
    script = f"launch/torchrun.sh tools/evaluate.py --model {{export}} --output {{results}} {shlex.join(flags)}"
    by_command = select(output / "exports", "--command", script)
    assert by_command["iteration"] == by_kl["iteration"] in (2, 4)
    assert (output / "exports" / f"iter_{by_kl['iteration']:07d}" / "export" / "config.json").is_file()
    for iteration in (2, 4):
        first, second = (record.load(output / way / f"iter_{iteration:07d}" / "results") for way in ("kl", "exports"))
        assert_same(second, first)
    arguments = {"checkpoint": str(run), "outputs": {"modelopt": str(output / "hf")}, "iteration": "selected"}
    server.run("training_jobs:export_checkpoint", 1, arguments)
    assert json_records.read(output / "hf" / EXPORT_FILE)["iteration"] == f"iter_{by_kl['iteration']:07d}"


def test_refusals(llama, tmp_path):
    for model, flags, message in (
        (tmp_path, (), "no hf/config.json"),
        (llama.run, ("--iteration", "7"), "iter_0000007 is not a torch_dist checkpoint"),
        (llama.directory / "hf", ("--iteration", "1"), "is an exported directory"),
        (llama.run, ("--eval-iters", "0"), "nothing would be evaluated"),
        (llama.run, ("--output", str(llama.run)), "which is not of an evaluation"),
    ):
        assert message in llama.evaluate(model, "refused", "tp1", *flags, fails=True)
