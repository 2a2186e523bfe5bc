"""tools/sensitivity.py and tools/noise_floor.py on a tiny model."""

import json

import pytest
import tiny_job
import yaml

from megatron_qad.engine.run_directory import json_records
from megatron_qad.models.families import family_of
from megatron_qad.quantization import policy
from megatron_qad.quantization.format_table import format_rows

CONFIG = tiny_job.LLAMA | {"dtype": "bfloat16"}
PARALLELISM = {
    "tp1": (1, []),
    "tp2": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory, server):
    directory = tmp_path_factory.mktemp("sensitivity")
    tiny_job.write_hf(directory / "hf", CONFIG)
    tiny_job.write_data(directory / "data", vocab_size=CONFIG["vocab_size"])
    models = [(str(directory / "hf"), str(directory / "teacher"), "bfloat16")]
    server.run("training_jobs:import_checkpoints", 1, {"models": models})

    flags_of_jobs = [
        *("--qad-teacher", f"{directory}/teacher", "--data-path", f"{directory}/data"),
        *("--data-cache-path", f"{directory}/cache", "--split", "50,50,0", "--bf16", "--seq-length", "32"),
        *("--micro-batch-size", "2", "--global-batch-size", "8", *tiny_job.READ_HERE),
    ]

    def run(output, *flags, parallelism="tp1", tool="sensitivity", **more):
        nproc, parallel_flags = PARALLELISM[parallelism]
        argv = [*(("--output", str(output)) if output else ()), *flags_of_jobs, *parallel_flags, *flags]
        return server.run("training_jobs:tool", nproc, {"name": tool, "argv": argv}, **more)

    def train(run, *flags):
        server.run("training_jobs:train", 1, {"argv": [*flags_of_jobs, "--save", str(run), *flags]})

    def num_counted_tokens() -> int:
        """Return the number of counted tokens of the validation split. Arrays are views that close with the dataset."""
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        masks = IndexedDataset(f"{directory}/data_loss_mask")
        return sum(int(masks[i].sum()) for i in range(len(masks) // 2, len(masks)))

    run.num_counted_tokens, run.train = num_counted_tokens, train
    return run


def bytes_of(formats) -> int:
    linears = family_of(CONFIG).linears(CONFIG)
    return sum(row.bytes_after for row in format_rows(linears, formats) if row.kind != "head")


def test_proposal_fits_the_budget_and_has_a_lower_kl(shop, tmp_path):
    linears = family_of(CONFIG).linears(CONFIG)
    smallest, largest = (bytes_of({x.megatron: fmt for x in linears}) for fmt in ("nvfp4", "bf16"))
    budget = (smallest + largest) // 2
    shop(tmp_path, "--formats", "nvfp4", "fp8", "--budget-mb", str(budget / 1e6))
    report = json.loads((tmp_path / "sensitivity.json").read_text())
    units = {(unit["name"], unit["format"]): unit["kl"] for unit in report["units"]}
    assert len(units) == 4 * 2 and all(kl > 0 for kl in units.values())
    for layer in range(4):  # eight bits have a lower KL than four
        assert units[f"decoder.layers.{layer}.*", "fp8"] < units[f"decoder.layers.{layer}.*", "nvfp4"]
    assert report["everything"]["nvfp4"] > max(kl for (_, fmt), kl in units.items() if fmt == "nvfp4")
    rules = policy.load(str(tmp_path / "policy.yaml"))
    formats = policy.resolve(rules, linears)
    assert formats["output_layer.weight"] == "bf16"
    assert smallest < bytes_of(formats) <= budget
    assert report["proposal"]["kl"] < report["everything"]["nvfp4"] / 2
    assert {fmt for name, fmt in formats.items() if "layers" in name} == set(report["proposal"]["formats"].values())
    assert "every attention" in (tmp_path / "sensitivity.md").read_text()
    assert (tmp_path / "sensitivity.png").read_bytes().startswith(b"\x89PNG")


def test_kls_do_not_depend_on_parallelism(shop, tmp_path):
    """Quantizes weights only, so that the last bit of an input cannot change its code (docs/decisions/parallelism.md).
    Tensor parallelism adds in another order in BF16, which changes a KL of 0.01 by a few per cent."""
    kls = {}
    for parallelism in PARALLELISM:  # more microbatches than there are: all measure the whole validation split once
        shop(tmp_path / parallelism, "--formats", "nvfp4-w4a16", "--num-microbatches", "1000", parallelism=parallelism)
        kls[parallelism] = json.loads((tmp_path / parallelism / "sensitivity.json").read_text())
    one = kls["tp1"]["units"]
    assert shop.num_counted_tokens() - kls["tp1"]["num_tokens"] in (0, 1)  # the first token of the data is not a label
    assert kls["pp2"]["units"] == one and kls["pp2"]["num_tokens"] == kls["tp1"]["num_tokens"]
    for actual, expected in zip(kls["tp2"]["units"], one, strict=True):
        assert actual["kl"] == pytest.approx(expected["kl"], rel=0.1), actual["name"]


def test_small_budget_empty_policy_headroom_and_rule_are_rejected(shop, tmp_path):
    assert "takes" not in (error := shop(tmp_path, "--budget-mb", "0.001", fails=True))
    assert "a budget of 1,000 bytes is below the" in error
    assert "quantizes nothing" in shop(tmp_path, "--qad-policy", "bf16", fails=True)
    assert "only NVFP4 has room" in shop(tmp_path, "--qad-calibration-headroom", "9", fails=True)
    frozen = ["--qad-policy-override", "attention=nvfp4:frozen", "mlp=nvfp4:frozen"]
    rule = ["--qad-weight-scale-rule", "local_hessian"]
    assert "its scales depend on inputs, which are not collected here" in shop(tmp_path, *frozen, *rule, fails=True)


def test_proposed_policy_has_the_fewest_rules(shop, tmp_path):
    shop(tmp_path, "--budget-mb", "1")  # room for everything
    document = yaml.safe_load((tmp_path / "policy.yaml").read_text())
    assert document == {
        "rules": [{"layer": [0, 1, 2, 3], "format": "bf16"}, {"name": "output_layer", "format": "bf16"}]
    }


def test_noise_floor(shop, tmp_path):
    """Rounding errors change few inputs to other NVFP4 numbers: less than quantization does, but measurably."""
    run, policy_flags = tmp_path / "run", ("--qad-policy-override", "head=nvfp4")
    shop.train(run, "--qad-ptq", *policy_flags, "--eval-iters", "4")
    (ptq,) = json_records.read(run / "best_checkpoints.json")
    noise, common = {}, ("--qad-student", str(run), *policy_flags, "--num-microbatches", "1000")
    jobs = (("one", "tp1", "1"), ("again", "tp1", "1"), ("other", "tp1", "2"), ("tp2", "tp2", "1"))
    for name, parallelism, seed in jobs:
        file = tmp_path / f"{name}.json"
        shop(file, *common, "--noise-seed", seed, tool="noise_floor", parallelism=parallelism)
        noise[name] = json.loads(file.read_text())
    assert noise["one"] == noise["again"] and noise["one"]["kl"] != noise["other"]["kl"]
    assert noise["one"]["floor"] == noise["one"]["kl"] / 2
    assert 0 < noise["one"]["kl"] < ptq["kl_to_teacher"]
    assert noise["tp2"]["kl"] == pytest.approx(noise["one"]["kl"], rel=0.5)  # other additions are other rounding errors
    refused = shop(None, "--qad-student", str(run), "--qad-policy", "bf16", tool="noise_floor", fails=True)
    assert "quantizes no input, so there is no noise to measure" in refused
