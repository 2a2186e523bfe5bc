"""The settings that ``megatron-qad run`` chooses: batch and steps from the data, parallelism from the planner."""

import json

import pytest

from megatron_qad.cli.commands.run_command import given_flags, last_validation
from megatron_qad.cli.run_settings import Machine, choose_settings
from megatron_qad.engine.errors import QADError

CPU = Machine(1, None)
QWEN2_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def settings(tmp_path, num_tokens, machine=CPU, longest=4096, **given):
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_7B | {"max_position_embeddings": longest}))
    (tmp_path / "data.json").write_text(json.dumps({"tokens": num_tokens}))
    given = {name.replace("_", "-"): value for name, value in given.items()}
    return choose_settings(tmp_path, "nvfp4-all-linear", str(tmp_path / "data"), machine, given)


@pytest.mark.parametrize(
    "rows, ranks, batch, steps",
    [
        (1_000_000, 8, 64, 1500),  # long enough for the longest training
        (64_000, 8, 64, 1000),  # one epoch
        (1_600, 8, 16, 100),  # a smaller batch makes 100 steps of one epoch
        (100, 8, 8, 100),  # 8 epochs, because a batch has a row for each rank
        (10, 1, 1, 100),
    ],
)
def test_batch_and_steps(tmp_path, rows, ranks, batch, steps):
    chosen = settings(tmp_path, rows * 4096, Machine(ranks, None))
    assert (chosen["global-batch-size"], chosen["train-iters"]) == (batch, steps)
    assert chosen["eval-interval"] == chosen["save-interval"] == steps // 10
    assert 0 < chosen["lr-warmup-iters"] < steps and chosen["seq-length"] == 4096
    assert (chosen["lr"], chosen["min-lr"]) == (1e-5, 1e-6)


def test_rows_are_as_long_as_the_model_allows_or_8192(tmp_path):
    assert settings(tmp_path, 10**6, longest=512)["seq-length"] == 512
    assert settings(tmp_path, 10**6, longest=32768)["seq-length"] == 8192
    wrapped = {"architectures": ["NemotronH_Nano_VL_V2"], "llm_config": QWEN2_7B}
    (tmp_path / "config.json").write_text(json.dumps(wrapped))
    with pytest.raises(QADError, match="config.json"):  # an incomplete config is refused as by the import
        choose_settings(tmp_path, "nvfp4-all-linear", str(tmp_path / "data"), CPU, {})


def test_flags_of_the_user_are_left_out_and_change_what_depends_on_them(tmp_path):
    chosen = settings(tmp_path, 1_000_000, train_iters="6", lr="1e-3", seq_length="128")
    assert not {"train-iters", "lr", "seq-length"} & chosen.keys()
    assert chosen["lr-warmup-iters"] < 6 and chosen["min-lr"] == pytest.approx(1e-4) and chosen["eval-interval"] == 1


def test_parallelism_is_that_of_the_planner(tmp_path, hf_config):
    (tmp_path / "data.json").write_text(json.dumps({"tokens": 10**9}))
    machine = Machine(8, 80 * 10**9)
    chosen = choose_settings(hf_config, "nvfp4-all-linear", str(tmp_path / "data"), machine, {})
    assert chosen["tensor-model-parallel-size"] in ("2", "4", "8") or chosen.get("context-parallel-size")
    assert chosen["use-distributed-optimizer"] is True and chosen["micro-batch-size"] == "1"
    own = choose_settings(
        hf_config, "nvfp4-all-linear", str(tmp_path / "data"), machine, {"tensor-model-parallel-size": "4"}
    )
    assert "tensor-model-parallel-size" not in own and "context-parallel-size" not in own


@pytest.fixture
def hf_config(tmp_path):
    """A directory with the config of Qwen2.5 7B (28 layers)."""
    directory = tmp_path / "hf"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(QWEN2_7B))
    return directory


def test_too_small_gpus_name_the_planner(tmp_path, hf_config):
    (tmp_path / "data.json").write_text(json.dumps({"tokens": 10**9}))
    with pytest.raises(QADError, match="no layout fits into 1 GPUs of 16 GB. Run megatron-qad plan"):
        choose_settings(hf_config, "nvfp4-all-linear", str(tmp_path / "data"), Machine(1, 16 * 10**9), {})


def test_given_flags_come_from_files_and_the_command_line(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("train_iters: 5\nlr: 1.0e-3\n")
    flags = ["--config", str(file), "--train-iters", "7", "--bf16"]
    assert given_flags(flags) == {"train-iters": "7", "lr": 1e-3, "bf16": True}
    file.write_text("[1]")
    with pytest.raises(QADError, match="expected a mapping"):
        given_flags(flags)


def test_last_validation(tmp_path):
    file = tmp_path / "metrics.jsonl"
    with pytest.raises(QADError, match="has no validation"):
        last_validation(file)
    rows = [{"step": 1, "validation/kl_to_teacher": 0.5}, {"step": 2, "lr": 1}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert last_validation(file)["validation/kl_to_teacher"] == 0.5
