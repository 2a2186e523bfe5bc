"""Tests of rule selectors on a hybrid model with experts, of overridden rules, and of error messages."""

from dataclasses import dataclass

import pytest
import yaml

from megatron_qad.engine import QADError
from megatron_qad.formats.format_registry import FORMATS
from megatron_qad.quantization.policy import layer_kinds_of, load, resolve
from megatron_qad.quantization.rules import parse_override, parse_rule

PATTERN = "M-ME*-M*"
KINDS = {"M": "mamba", "-": "mlp", "E": "expert", "*": "attention"}


@dataclass
class Linear:
    megatron: str
    kind: str
    layer: int | None
    is_tied: bool = False


def make_linears(pattern: str = PATTERN) -> list[Linear]:
    linears = []
    for layer, symbol in enumerate(pattern):
        parts = {
            "M": [("mamba", "mixer.in_proj"), ("mamba", "mixer.out_proj")],
            "*": [("attention", "self_attention.linear_qkv"), ("attention", "self_attention.linear_proj")],
            "-": [("mlp", "mlp.linear_fc1"), ("mlp", "mlp.linear_fc2")],
            "E": [
                *(("expert", f"mlp.experts.experts.{i}.linear_{fc}") for i in range(2) for fc in ("fc1", "fc2")),
                *(("shared_expert", f"mlp.shared_experts.linear_{fc}") for fc in ("fc1", "fc2")),
            ],
        }[symbol]
        linears += [Linear(f"decoder.layers.{layer}.{module}.weight", kind, layer) for kind, module in parts]
    return [*linears, Linear("output_layer.weight", "head", None)]


ALL = ["attention", "mamba", "mlp", "expert", "shared_expert", "head"]
LINEARS = make_linears()
BASE = {"kind": ALL, "format": "bf16"}


def make_policy(tmp_path, *rules, **document):
    file = tmp_path / "policy.yaml"
    file.write_text(yaml.safe_dump({"rules": list(rules), **document}))
    return load(str(file))


def quantized(policy, linears=LINEARS, layer_kinds=None) -> list[str]:
    """Names, without ``decoder.layers.``, of the linears that are not in bf16."""
    formats = resolve(policy, linears, layer_kinds)
    return [n.removeprefix("decoder.layers.").removesuffix(".weight") for n, f in formats.items() if f != "bf16"]


def layers(names: list[str]) -> list[int]:
    return sorted({int(name.split(".")[0]) for name in names})


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"kind": "mamba"}, [0, 2, 6]),
        ({"kind": ["mlp", "expert"]}, [1, 3, 5]),
        ({"kind": "shared_expert"}, [3]),
        ({"layer": 3}, [3]),
        ({"layer": [0, 5]}, [0, 5]),
        ({"layer": "1-3"}, [1, 2, 3]),
        ({"layer": ["0-1", 7]}, [0, 1, 7]),
        ({"first": 2}, [0, 1]),
        ({"last": 3}, [5, 6, 7]),
        ({"first": 8}, list(range(8))),
        ({"kind": "mamba", "first": 3}, [0, 2]),  # the Mamba layers among the first three layers
        ({"kind": "mamba", "before": "attention"}, [2, 6]),  # the expert layer 3 is between 2 and attention layer 4
        ({"kind": ["mamba", "expert"], "before": "attention"}, [3, 6]),
        ({"kind": "shared_expert", "before": "attention"}, [3]),
        ({"kind": "attention", "before": "mlp"}, [4]),
        ({"kind": "mamba", "before": "attention", "last": 4}, [6]),
        ({"projection": "linear_proj"}, [4, 7]),
        ({"projection": ["in_proj", "linear_qkv"]}, [0, 2, 4, 6, 7]),
        ({"kind": "mlp", "projection": "linear_fc2"}, [1, 5]),
        ({"name": "decoder.layers.[01].*"}, [0, 1]),
        ({"name": "*.experts.*"}, [3]),
        ({"name": "*fc1", "first": 2}, [1]),
    ],
)
def test_selectors_choose_layers(tmp_path, rule, expected):
    policy = make_policy(tmp_path, BASE, {**rule, "format": "nvfp4"})
    assert layers(quantized(policy)) == expected


def test_linear_must_match_all_selectors_of_a_rule(tmp_path):
    rule = {"kind": ["expert", "shared_expert"], "projection": "linear_fc1", "name": "*.experts.*", "format": "fp8"}
    with pytest.raises(QADError, match=r"experts\.0\.linear_fc2 is bf16, but .*experts\.0\.linear_fc1 .* is fp8"):
        quantized(make_policy(tmp_path, BASE, rule))
    rule["projection"] = ["linear_fc1", "linear_fc2"]
    experts = [f"3.mlp.experts.experts.{i}.linear_fc{j}" for i in range(2) for j in (1, 2)]
    assert quantized(make_policy(tmp_path, BASE, rule)) == experts


@pytest.mark.parametrize("selector", [{"name": "*.experts.1.*"}, {"name": "*.experts.1.linear_fc2"}])
def test_experts_of_a_layer_must_have_one_format(tmp_path, selector):
    base = {"kind": ALL, "format": "nvfp4"}
    with pytest.raises(QADError, match="is bf16, but .*of the same layer is nvfp4.*experts.\\*=bf16'"):
        resolve(make_policy(tmp_path, base, {**selector, "format": "bf16"}), LINEARS)
    resolve(make_policy(tmp_path, base, {"name": "*.mlp.experts.*", "format": "bf16"}), LINEARS)


def test_policies_accept_every_registered_format(tmp_path):
    for fmt in FORMATS:
        assert set(resolve(make_policy(tmp_path, {"kind": ALL, "format": fmt}), LINEARS).values()) == {fmt}


def test_later_rules_win(tmp_path):
    rules = [{"kind": ALL, "format": "nvfp4"}, {"kind": "head", "format": "bf16"}, {"first": 1, "format": "fp8"}]
    formats = resolve(make_policy(tmp_path, *rules), LINEARS)
    assert formats["decoder.layers.0.mixer.in_proj.weight"] == "fp8"
    assert formats["decoder.layers.1.mlp.linear_fc1.weight"] == "nvfp4"
    assert formats["output_layer.weight"] == "bf16"


def test_layer_positions_include_layers_without_linears():
    """``layer_kinds`` includes a last layer without linears, which the list of linears does not show."""
    policy = load("nvfp4-all-linear", ["last:2=bf16"])
    without = [linear for linear in LINEARS if linear.layer != 7]
    kinds = [KINDS[symbol] for symbol in PATTERN]
    assert layers(set(quantized(load("nvfp4-all-linear"), without)) - set(quantized(policy, without))) == [5, 6]
    assert layers(set(quantized(load("nvfp4-all-linear"), without)) - set(quantized(policy, without, kinds))) == [6]


def test_layer_kinds_are_derived_from_linears():
    assert layer_kinds_of(LINEARS) == [KINDS[symbol] for symbol in PATTERN]
    assert layer_kinds_of(LINEARS[:2] + LINEARS[4:6]) == ["mamba", None, "mamba"]
    assert layer_kinds_of([LINEARS[-1]]) == []


def test_kv_cache_format(tmp_path):
    assert make_policy(tmp_path, BASE).kv_cache == "bf16"
    assert make_policy(tmp_path, BASE, kv_cache="fp8").kv_cache == "fp8"
    assert load("bf16", ["kv_cache=fp8", "head=fp8"]).kv_cache == "fp8"
    resolve(load("bf16", ["kv_cache=fp8"]), LINEARS)
    with pytest.raises(QADError, match="kv_cache fp8, but this model has no attention layer"):
        resolve(load("bf16", ["kv_cache=fp8"]), make_linears("M-M"))
    for overrides, document in ((["kv_cache=fp4"], {}), ([], {"kv_cache": "fp4"})):
        with pytest.raises(QADError, match=r"unknown KV cache format 'fp4' \(.* 'fp8'\?\)\. Choose one of bf16, fp8"):
            make_policy(tmp_path, BASE, **document) if document else load("bf16", overrides)


def test_overrides_support_all_selectors():
    entry = {"kind": ["mamba", "mlp"], "layer": ["0-2", 5], "first": 6, "format": "fp8"}
    assert parse_override("kind:mamba+mlp,layer:0-2+5,first:6=fp8") == parse_rule(entry, "", is_override=True)
    assert parse_override("kind:mamba,before:attention=bf16").before == "attention"
    assert parse_override("mlp+expert=nvfp4").kinds == ("mlp", "expert")
    assert parse_override("name:*fc1,last:2=bf16").name == "*fc1"


@pytest.mark.parametrize(
    "text",
    [
        "mlp+expert=nvfp4",
        "decoder.layers.0.*=bf16",
        "kind:mamba,before:attention=bf16",
        "layer:0+1+5,projection:a+b=fp8",
        "first:2=bf16",
        "last:2,name:*fc1=bf16",
    ],
)
def test_rule_string_parses_to_the_same_rule(text):
    rule = parse_override(text)
    assert parse_override(str(rule)) == rule


def test_rule_that_later_rules_fully_override_is_an_error(tmp_path):
    policy = make_policy(tmp_path, BASE, {"kind": "mlp", "format": "nvfp4"}, {"layer": [1, 5], "format": "fp8"})
    with pytest.raises(
        QADError, match=r"rule 'mlp=nvfp4' has no effect.* the later 'layer:1\+5=fp8'. Move 'mlp=nvfp4'"
    ):
        resolve(policy, LINEARS)
    both = [{"kind": "mlp", "format": "nvfp4"}, {"layer": 1, "format": "fp8"}, {"layer": 5, "format": "bf16"}]
    with pytest.raises(QADError, match="'mlp=nvfp4' has no effect.*'layer:1=fp8', 'layer:5=bf16'"):
        resolve(make_policy(tmp_path, BASE, *both), LINEARS)


def test_partly_overridden_and_agreeing_rules_are_valid(tmp_path):
    partly = [BASE, {"kind": "mlp", "format": "nvfp4"}, {"layer": 1, "format": "fp8"}]
    assert layers(quantized(make_policy(tmp_path, *partly))) == [1, 5]
    again = [{"kind": ALL, "format": "bf16"}, {"kind": "attention", "format": "bf16"}, {"last": 8, "format": "bf16"}]
    assert quantized(make_policy(tmp_path, *again)) == []
    assert quantized(load("nvfp4-all-linear", [f"{kind}=bf16" for kind in ALL])) == []  # overrides may


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"first": 9}, "rule first:9=nvfp4: first 9 layers of a model with 8"),
        ({"last": 9}, "rule last:9=nvfp4: last 9 layers of a model with 8"),
        ({"layer": [1, 8]}, "no layer 8 in a model with layers 0 to 7"),
        ({"first": 2, "last": 2}, "For 'first or last' write two rules"),
        ({"kind": "mamba", "layer": 1}, r"rule kind:mamba,layer:1=nvfp4 matches no linear"),
        ({"kind": "mamba", "before": "mamba", "first": 1, "layer": 1}, "matches no linear"),
        ({"projection": "linear_pro"}, r"did you mean 'linear_proj'\?\)\. Its projections are in_proj, linear_fc1"),
        ({"name": "decoder.layers.3.mlp.router"}, "other modules .router, embedding, norm, conv1d. are never"),
        ({"name": "atention"}, r"did you mean 'attention'\?"),
    ],
)
def test_rules_that_do_not_match_the_model_are_errors(tmp_path, rule, message):
    with pytest.raises(QADError, match=message):
        resolve(make_policy(tmp_path, BASE, {**rule, "format": "nvfp4"}), LINEARS)


def test_kinds_that_the_model_lacks(tmp_path):
    dense = make_linears("*-*-")
    quantized(load("nvfp4-all-linear"), dense)  # one kind of several may be missing
    with pytest.raises(QADError, match="no linear of kind mamba or expert. Its kinds are attention, head, mlp"):
        resolve(make_policy(tmp_path, BASE, {"kind": ["mamba", "expert"], "format": "fp8"}), dense)
    with pytest.raises(QADError, match="matches no linear"):  # nothing precedes the first layer
        resolve(make_policy(tmp_path, BASE, {"kind": "mlp", "before": "attention", "format": "fp8"}), dense[:4])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"kind": "mlp", "fromat": "fp8", "format": "fp8"}, r"unknown key 'fromat' \(did you mean 'format'\?\)"),
        ({"kind": "mlp", "format": "nvfp"}, r"unknown format 'nvfp' \(did you mean 'nvfp4'\?\)"),
        ({"kind": "atention", "format": "fp8"}, r"unknown kind 'atention' \(did you mean 'attention'\?\)"),
        ({"kind": [], "format": "fp8"}, "'kind' must be a string or a list of strings"),
        ({"kind": 3, "format": "fp8"}, "'kind' must be a string or a list of strings"),
        ({"format": "fp8"}, "at least one of kind, layer"),
        ({"kind": "mlp"}, "A rule needs 'format'"),
        ({"first": 0, "format": "fp8"}, "'first' must be a number of layers, at least 1"),
        ({"last": "2", "format": "fp8"}, "'last' must be a number of layers, at least 1; found '2'"),
        ({"first": True, "format": "fp8"}, "'first' must be a number of layers"),
        ({"layer": "3-1", "format": "fp8"}, "an index, a range such as 0-3"),
        ({"layer": -1, "format": "fp8"}, "an index, a range such as 0-3"),
        ({"layer": [], "format": "fp8"}, "empty list"),
        ({"before": "attention", "format": "fp8"}, "'before: attention' also needs 'kind'"),
        (
            {"kind": "mamba", "before": "head", "format": "fp8"},
            "unknown kind of layer 'head'. Choose one of attention, mamba",
        ),
        ({"kind": "router", "format": "fp8"}, r"gives 'router' the format fp8, but routers, embeddings.*\. Remove it"),
        ({"kind": ["mlp", "embedding"], "format": "nvfp4"}, "gives 'embedding' the format nvfp4, but routers"),
        ({"projection": "conv1d", "format": "nvfp4"}, "gives 'conv1d' the format nvfp4"),
        ({"kind": "norm", "format": "bf16"}, "rules cannot select the kind 'norm'. Remove it: .*norms.*without a rule"),
        ({"kind": "vision", "format": "nvfp4"}, "rules cannot select the kind 'vision'"),
    ],
)
def test_rule_errors_name_the_file(tmp_path, rule, message):
    with pytest.raises(QADError, match=message) as error:
        make_policy(tmp_path, rule)
    assert "policy.yaml" in str(error.value)


def test_override_errors_name_the_flag():
    for text in ("=fp8", "head"):
        with pytest.raises(QADError, match="--rule .*expected KIND=FORMAT"):
            load("bf16", [text], flag="--rule")
    with pytest.raises(QADError, match="--qad-policy-override kind:mamba,frist:2=fp8: unknown key 'frist'.*'first'"):
        load("bf16", ["kind:mamba,frist:2=fp8"])


def test_rules_may_state_that_routers_and_embeddings_stay_in_bf16(tmp_path):
    both = {"kind": ["router", "embedding"], "format": "bf16"}
    quantized(make_policy(tmp_path, BASE, both))
    router = {"kind": "router", "format": "bf16"}
    quantized(make_policy(tmp_path, BASE, router))
    with pytest.raises(QADError, match="no linear of kind router"):
        resolve(make_policy(tmp_path, BASE, router), make_linears("*-"))
