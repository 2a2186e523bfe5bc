"""Checkpoints of QADTrainer: what is written next to transformers' files, and how an export reads both."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_qad.checkpoint.export_hf import export_provenance
from megatron_qad.checkpoint.trainer_checkpoint import TrainerCheckpointReader
from megatron_qad.engine.errors import QADError
from megatron_qad.formats import nvfp4, nvfp4_fixed
from megatron_qad.hf_training.quantize_model import quantize_model
from megatron_qad.hf_training.trainer_files import check_same_job, write_files
from megatron_qad.models.checkpoint_config import read_config, read_job
from megatron_qad.models.families import family_of
from megatron_qad.quantization.carried_scales import AMAX, BLOCK_SCALES

QKV = "decoder.layers.2.self_attention.linear_qkv.weight"


@pytest.fixture
def checkpoint(make_student, tmp_path):
    """Return a directory as QADTrainer writes it."""
    model = make_student()
    model.save_pretrained(tmp_path)
    write_files(tmp_path, model, loss="kl", max_lr=1e-3, num_steps=7)
    return tmp_path


def open_reader(checkpoint) -> tuple[TrainerCheckpointReader, dict]:
    config = read_config(checkpoint)
    maps = family_of(config).tensors(config)
    return TrainerCheckpointReader(checkpoint, maps), {m.megatron: m for m in maps}


def test_tensors_are_those_of_megatron(checkpoint):
    """The masters, and the scales of q, k and v in the order of Megatron's rows."""
    reader, maps = open_reader(checkpoint)
    ((_, weight),) = reader.layers([maps[QKV]])
    assert reader.stored_dtype(maps[QKV]) == weight.dtype == torch.float32
    tensors = load_file(checkpoint / "model.safetensors")
    assert torch.equal(weight, maps[QKV].to_megatron([tensors[name] for name in maps[QKV].hf]))
    amax = reader.read_carried(maps[QKV], AMAX)
    assert amax == weight.abs().amax()
    scale = nvfp4.global_scale_from_amax(amax[0], rule="mse")
    expected = nvfp4_fixed.block_scales(weight, scale, rule="mse")
    assert torch.equal(reader.read_carried(maps[QKV], BLOCK_SCALES), expected.view(torch.uint8))
    amaxes = reader.read_amaxes()
    assert len(amaxes) == 8 and all(value > 0 for value in amaxes.values())
    assert amaxes["decoder.layers.0.self_attention.linear_qkv.input_quantizer._amax"].shape == (1,)


def test_amaxes_of_scales_of_every_step_are_those_of_the_masters(make_student, tmp_path):
    model = make_student(scales="max")
    model.save_pretrained(tmp_path)
    write_files(tmp_path, model, loss="kl", max_lr=None, num_steps=0)
    reader, maps = open_reader(tmp_path)
    ((_, weight),) = reader.layers([maps[QKV]])
    assert reader.read_carried(maps[QKV], AMAX) == weight.abs().amax()


def test_records(checkpoint, make_student):
    job = read_job(checkpoint)
    assert job["formats"][QKV] == "nvfp4" and job["scale_rule"] == "mse:frozen"
    assert (job["max_lr"], job["num_steps"], job["smoothing"]) == (1e-3, 7, None)
    check_same_job(checkpoint, make_student())
    with pytest.raises(QADError, match="has the scales mse:frozen, but max in this model"):
        check_same_job(checkpoint, make_student(scales="max"))
    with pytest.raises(QADError, match="has the format nvfp4, but bf16 in this model"):
        check_same_job(checkpoint, make_student("bf16"))
    first = export_provenance(checkpoint, "modelopt")
    assert first != export_provenance(checkpoint, "compressed-tensors")
    with pytest.raises(QADError, match="is one checkpoint of QADTrainer, found iteration 3"):
        export_provenance(checkpoint, "modelopt", 3)


def test_config_of_the_original_model_is_kept(make_model, tmp_path):
    """transformers writes the dtype of the masters to config.json; exports have that of the original."""
    original, checkpoint = tmp_path / "original", tmp_path / "checkpoint"
    make_model().to(torch.bfloat16).save_pretrained(original)
    (original / "tokenizer_config.json").write_text("{}")
    model = quantize_model(type(make_model()).from_pretrained(original, dtype=torch.float32))
    model.save_pretrained(checkpoint)
    write_files(checkpoint, model, loss="kl", max_lr=None, num_steps=0)
    assert json.loads((checkpoint / "config.json").read_text())["dtype"] == "float32"
    assert read_config(checkpoint)["dtype"] == "bfloat16"
    assert (checkpoint / "hf" / "tokenizer_config.json").read_text() == "{}"


def test_damage(checkpoint):
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.k_proj.input_amax"] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    reader, _ = open_reader(checkpoint)
    with pytest.raises(QADError, match="k_proj.input_amax is .*, but .* in model.layers.1.self_attn.q_proj"):
        reader.read_amaxes()
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    reader, maps = open_reader(checkpoint)
    with pytest.raises(QADError, match="no tensor 'model.norm.weight'"):
        reader.stored_dtype(maps["decoder.final_norm.weight"])


def test_amaxes_before_the_calibration_are_unknown(make_model, tmp_path):
    model = quantize_model(make_model())
    model.save_pretrained(tmp_path)
    write_files(tmp_path, model, loss="kl", max_lr=None, num_steps=0)
    assert open_reader(tmp_path)[0].read_amaxes() == {}


def test_a_model_in_the_same_directory_is_kept(checkpoint, make_student):
    (checkpoint / "hf" / "integrity.json").unlink()
    with pytest.raises(QADError, match="hf: exists, and QADTrainer did not write it"):
        write_files(checkpoint, make_student(), loss="kl", max_lr=None, num_steps=0)


def test_other_directories_are_not_resumed_from(checkpoint, make_student):
    shutil.rmtree(checkpoint / "hf")
    with pytest.raises(QADError, match="no qad.json of QADTrainer"):
        check_same_job(checkpoint, make_student())
