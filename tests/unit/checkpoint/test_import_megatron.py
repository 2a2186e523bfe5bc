"""Import of Megatron's checkpoints: values, directories, formats, damaged files, and the command of the guide.

tests/dist/test_megatron_checkpoints.py saves real models and compares logits. Here they are a few random tensors.
"""

import json
import pickle
import shlex
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from gpt_checkpoint import ARGS, BRIDGE, CONFIG, FC1, GPT, HEAD, QKV
from guides import code_of
from tiny_configs import TINY_OF_FAMILY

from megatron_qad.cli.main import run
from megatron_qad.engine import QADError, init_runtime

init_runtime()  # before megatron

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing import ShardedTensor  # noqa: E402

from megatron_qad.checkpoint.import_megatron import import_megatron  # noqa: E402
from megatron_qad.checkpoint.slice_reader import Slice, SliceReader  # noqa: E402
from megatron_qad.engine.distributed import init_process_group  # noqa: E402
from megatron_qad.engine.megatron_fixes import save_checkpoints_in_this_process  # noqa: E402
from megatron_qad.models.checkpoint_config import read_config  # noqa: E402

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True, scope="module")
def process_group():
    init_process_group()
    save_checkpoints_in_this_process()
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def hf(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "hf" / "tokenizer.json").write_text('{"model": {}}')
    return tmp_path / "hf"


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in GPT.items()}


def save(root: Path, tensors: dict[str, torch.Tensor], iteration: int = 10, **state) -> Path:
    directory = root / f"iter_{iteration:07d}"
    directory.mkdir(parents=True)
    sharded = {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in tensors.items()}
    dist_checkpointing.save({**sharded, **state}, str(directory))
    (root / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return root


@pytest.fixture
def source(tmp_path):
    return save(tmp_path / "megatron", weights(), args=Namespace(**ARGS))


@pytest.fixture
def refused(tmp_path, hf):
    """``refused(checkpoint, **changes to the config)``: the message of a failed import, which leaves no output."""

    def check(checkpoint, **changes) -> str:
        (hf / "config.json").write_text(json.dumps(CONFIG | changes))
        with pytest.raises(QADError) as error:
            import_megatron(checkpoint, hf, tmp_path / "target")
        assert not (tmp_path / "target").exists()
        return str(error.value)

    return check


def read(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = SliceReader(checkpoint / "release")
    names = sorted(reader.stored)
    slices = [Slice(name, (0,) * len(reader.stored[name].shape), reader.stored[name].shape) for name in names]
    return dict(zip(names, reader.read(slices), strict=True))


def test_stacked_layers_become_pairs_of_layers(source, hf, tmp_path, capsys):
    assert import_megatron(source, hf, tmp_path / "target") == 21
    assert "WARNING" not in capsys.readouterr().out
    imported, original = read(tmp_path / "target"), weights()
    assert len(imported) == 21 and all(tensor.dtype == torch.bfloat16 for tensor in imported.values())
    for block in range(3):
        for name, pattern_layer in ((QKV, 2 * block), (FC1, 2 * block + 1)):
            target = name.replace("layers.", f"layers.{pattern_layer}.")
            assert torch.equal(imported[target], original[name][block]), target
    assert torch.equal(imported["decoder.final_norm.weight"], original["decoder.final_layernorm.weight"])
    assert torch.equal(imported[HEAD], original[HEAD][:40])
    assert (tmp_path / "target" / "hf" / "tokenizer.json").read_text() == '{"model": {}}'
    assert read_config(tmp_path / "target") == CONFIG


def test_processes_share_the_files(source, hf, tmp_path):
    import_megatron(source, hf, tmp_path / "one", num_workers=1, part_bytes=1)
    import_megatron(source, hf, tmp_path / "two", num_workers=2, part_bytes=1)
    one, two = (sorted((tmp_path / name / "release").iterdir()) for name in ("one", "two"))
    assert len(one) > 21 and [file.read_bytes() for file in one] == [file.read_bytes() for file in two]
    assert not list(tmp_path.glob(".two.*"))  # progress is removed


def test_checkpoint_that_contradicts_the_config_is_refused(tmp_path, source, refused):
    assert f"the arguments in {source}/iter_0000010: rotary_base is 500000" in refused(source, rope_theta=10000.0)
    (source / "iter_0000010" / "run_config.yaml").write_text(yaml.safe_dump({"model": BRIDGE, "train": {}}))
    assert "run_config.yaml: rotary_base is 500000.0, config.json implies 10000" in refused(source, rope_theta=10000.0)


def test_values_that_are_not_finite(tmp_path, refused):
    text = refused(save(tmp_path / "megatron", {**weights(), FC1: torch.full((3, 48, 16), torch.nan)}))
    assert f"{FC1}[0] has NaN or Inf values (768 of 768)" in text
    text = refused(save(tmp_path / "large", {**weights(), FC1: torch.full((3, 48, 16), 3.4e38)}))
    assert "overflow to Inf in bfloat16" in text and "Import with --dtype float32" in text


class Unknown:
    """A class that no checkpoint may ask for."""


@pytest.mark.parametrize("state", [{}, {"args": Unknown()}])
def test_without_readable_arguments_a_warning_says_what_is_not_compared(tmp_path, hf, capsys, state):
    import_megatron(save(tmp_path / "megatron", weights(), **state), hf, tmp_path / "target")
    out = capsys.readouterr().out
    assert "WARNING" in out and "(rotary base, norm epsilon, number of heads, router) are taken from config.json" in out


def test_optimizer_and_multi_token_prediction_are_left_out(tmp_path, hf, capsys):
    tensors = weights()
    others = {f"optimizer.state.exp_avg.{QKV}": tensors[QKV], f"chained_1.optimizer.state.param.{QKV}": tensors[QKV]}
    others["mtp.layers.0.enorm.weight"] = torch.ones(16)
    source = save(tmp_path / "megatron", {**tensors, **others}, args=Namespace(**ARGS))
    assert import_megatron(source, hf, tmp_path / "target") == 21
    out = capsys.readouterr().out
    assert "1 tensor of multi-token prediction layers (mtp.layers.0.enorm.weight, ...) left out" in out


def test_directories(source, hf, tmp_path, refused):
    assert import_megatron(source / "iter_0000010", hf / "config.json", tmp_path / "one") == 21
    tracker = source / "latest_checkpointed_iteration.txt"
    tracker.unlink()
    assert import_megatron(source, hf, tmp_path / "two") == 21
    shutil.copytree(source / "iter_0000010", source / "iter_0000020")
    assert "The directory has iter_0000010, iter_0000020. Give the" in refused(source)
    tracker.write_text("30")
    assert "iter_0000030 is not a torch_dist checkpoint" in refused(source)
    assert "already has hf/config.json" in refused(tmp_path / "one")
    assert "The directory has no iteration" in refused(hf)
    assert "absent: no such directory" in refused(tmp_path / "absent")
    with pytest.raises(QADError, match="absent: no config.json. Give the Hugging Face directory"):
        import_megatron(source, tmp_path / "absent", tmp_path / "target")


def test_other_formats_are_named(source, tmp_path, refused):
    legacy = tmp_path / "legacy"
    (legacy / "iter_0000010" / "mp_rank_00").mkdir(parents=True)
    (legacy / "iter_0000010" / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"x")
    (legacy / "latest_checkpointed_iteration.txt").write_text("10")
    assert "(format: torch). Convert other formats with Megatron-LM (--ckpt-convert-format" in refused(legacy)
    (source / "iter_0000010" / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert "(format: zarr)" in refused(source)


@pytest.mark.parametrize("kind", ["truncated", "missing", "metadata"])
def test_damaged_files(source, refused, kind):
    directory = source / "iter_0000010"
    file = directory / ".metadata" if kind == "metadata" else next(directory.glob("*.distcp"))
    file.unlink() if kind == "missing" else file.write_bytes(file.read_bytes()[:200])
    assert "iter_0000010: cannot be read (" in refused(source)


def test_values_that_no_file_holds(source, refused):
    """Megatron stores each block of a stacked tensor as a chunk. A chunk that is missing must not become noise."""
    file = source / "iter_0000010" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    chunk = metadata.state_dict_metadata[QKV].chunks[0]
    metadata.state_dict_metadata[QKV].chunks[:] = [replace(chunk, sizes=torch.Size((2, 32, 16)))]
    file.write_bytes(pickle.dumps(metadata))
    assert f"cannot be read ({QKV}: 0 of 512 values of a part are in the files)" in refused(source)


def test_metadata_that_would_run_code(source, refused):
    (source / "iter_0000010" / ".metadata").write_bytes(pickle.dumps(Unknown()))
    assert "Unknown, which does not belong in a checkpoint and could run code" in refused(source)


def test_families_with_tensors_outside_the_language_model(source, refused):
    config = TINY_OF_FAMILY["nemotron_vl"]
    text = refused(source, **config | {"llm_config": config["llm_config"] | {"num_experts_per_tok": 2}})
    assert "NemotronH_Nano_VL_V2 has tensors outside the language model" in text


@pytest.mark.parametrize("directory", ["root", "iteration"])
def test_other_commands_name_this_tool(source, directory):
    checkpoint = source if directory == "root" else source / "iter_0000010"
    with pytest.raises(QADError, match=f"megatron-qad import --checkpoint {checkpoint} --hf-config DIR"):
        read_config(checkpoint)


def test_other_commands_name_the_import_of_a_hugging_face_model(hf):
    with pytest.raises(QADError, match=f"megatron-qad import --hf-model {hf} --output NEW"):
        read_config(hf)


def test_command_of_the_guide(source, hf, tmp_path, monkeypatch, capsys):
    """The command runs as it stands there, in a directory that has its inputs; a second run reuses the output."""
    words = shlex.split(code_of("import_megatron.md")["bash"].replace("\\\n", " "))
    assert words[:2] == ["megatron-qad", "import"]
    source.rename(tmp_path / "gpt_checkpoint"), hf.rename(tmp_path / "my_model")
    monkeypatch.chdir(tmp_path)
    run(words[1:])
    assert "wrote 21 tensors to checkpoints/teacher" in capsys.readouterr().out
    run([*words[1:], "--reuse-existing"])
    assert capsys.readouterr().out == "checkpoints/teacher already exists and is up to date\n"
    with pytest.raises(QADError, match="was made from .*dtype bfloat16, .* expected .*dtype float32"):
        run([*words[1:], "--reuse-existing", "--dtype", "float32"])
