"""Policy files with values of wrong types: one error with the file, never a rule that means something else."""

import pytest

from megatron_qad.engine import QADError
from megatron_qad.quantization.policy import load


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("5", "found the rule 5"),
        ("[{format: nvfp4}]", "found the rule"),
        ("2020-01-01", "found the rule"),
        ("{format: nvfp4, 1: mlp}", "unknown key 1"),
        ("{format: 2020-01-01, kind: mlp}", "unknown format"),
        ("{format: [nvfp4], kind: mlp}", "unknown format ['nvfp4'] (did you mean 'nvfp4'?)"),
        ("{format: null, kind: mlp}", "unknown format None"),
        ("{format: nvfp4, kind: null}", "'kind' must be a string"),
        ("{format: nvfp4, kind: [[mlp]]}", "'kind' must be a string"),
        ("{format: nvfp4, name: [a]}", "'name' must be a pattern of module names; found ['a']"),
        ("{format: nvfp4, name: null}", "'name' must be a pattern of module names; found None"),
        ("{format: nvfp4, name: 5}", "'name' must be a pattern of module names; found 5"),
        ("{format: nvfp4, name: ''}", "'name' must be a pattern of module names; found ''"),
        ("{format: nvfp4, layer: .nan}", "'layer' must be an index"),
        ("{format: nvfp4, layer: 1.0}", "'layer' must be an index"),
        ("{format: nvfp4, layer: 0-100000000}", "'layer' must be an index"),
        ("{format: nvfp4, layer: 0-1-2}", "'layer' must be an index"),
        ("{format: nvfp4, layer: 3-1}", "'layer' must be an index"),
        ("{format: nvfp4, layer: [[1]]}", "'layer' must be an index"),
        ("{format: nvfp4, layer: '" + "9" * 5000 + "'}", "'layer' must be an index"),
        ("{format: nvfp4, layer: true}", "'layer' must be an index"),
        ("{format: nvfp4, first: null}", "'first' must be a number of layers"),
        ("{format: nvfp4, kind: mlp, before: null}", "unknown kind of layer None"),
        ("{format: nvfp4, kind: mlp, before: [attention]}", "unknown kind of layer ['attention']"),
        ("{format: nvfp4, kind: mlp, kind: head}", "the key 'kind' is there twice (line 2)"),
    ],
)
def test_rules_of_wrong_types(tmp_path, rule, message):
    file = tmp_path / "policy.yaml"
    file.write_text(f"rules:\n- {rule}\n")
    with pytest.raises(QADError) as raised:
        load(str(file))
    assert message in str(raised.value) and str(raised.value).startswith(str(file)) and len(str(raised.value)) < 700


@pytest.mark.parametrize("text", ["layer:" + "9" * 5000 + "=nvfp4", "layer:0-999999=nvfp4", "kind:mlp,layer:-1=nvfp4"])
def test_layers_of_an_override(text):
    with pytest.raises(QADError, match="'layer' must be an index"):
        load("bf16", [text])


def test_layers_are_read_as_before(tmp_path):
    file = tmp_path / "policy.yaml"
    file.write_text("rules:\n- {format: nvfp4, layer: [0, '2', 4-6, 99999]}\n")
    assert load(str(file)).rules[0].layers == (0, 2, 4, 5, 6, 99999)
    assert load("bf16", ["layer:1+3-4=fp8"]).rules[-1].layers == (1, 3, 4)
