"""report.html: what it shows, that text from files stays text, and that it needs no network."""

import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from megatron_qad.distillation.token_metrics import TOKEN_METRICS
from megatron_qad.evaluation.comparison import compare
from megatron_qad.evaluation.record import Evaluation
from megatron_qad.models.families import family_of
from megatron_qad.models.families.base import ParamMapping
from megatron_qad.quantization import policy as policies
from megatron_qad.quantization.format_table import format_rows
from megatron_qad.report.collect import Results
from megatron_qad.report.expert_table import Experts
from megatron_qad.report.exports import Export
from megatron_qad.report.html_page.document import Section, html
from megatron_qad.report.html_page.markup import element, markup
from megatron_qad.report.linear_grid import linear_grid
from megatron_qad.report.run_policies import RunPolicy
from megatron_qad.report.runs import Run
from megatron_qad.report.weight_errors import LinearError, RunWeight

EVIL = "<script>alert('x')</script> & $a_{b$ \"quoted\""
MODEL = {"architecture": "X", "num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 99, "num_weights": 10**6}


class Elements(HTMLParser):
    """Start tags with their attributes, and the text outside of style elements."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self.text, self._open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self._open:
            self.text += data


class Texts:
    """Texts of token ids, as ``TokenTexts`` has them."""

    def text(self, token):
        return EVIL if token == 1 else f" t{token}"

    def decode(self, ids):
        return EVIL + "\n" + "".join(f" t{i}" for i in ids)

    def class_of(self, token):
        return "digits" if token % 2 else "word start"


@pytest.fixture
def comparison(np_evaluation):
    return compare([np_evaluation("PTQ", 1.0), np_evaluation(EVIL, 0.25)], texts=Texts(), num_samples=100)


@pytest.fixture
def np_evaluation():
    """np_evaluation(name, factor): an evaluation of random numbers whose KL is ``factor`` times that of factor 1."""
    import numpy as np

    def make(name: str, factor: float) -> Evaluation:
        rng = np.random.default_rng(0)
        rows = rng.integers(0, 5, size=(30, 9)).astype(np.int32)
        row, column = (grid.ravel().astype(np.int32) for grid in np.mgrid[:30, :8])
        tokens = {metric: rng.random(len(row)).astype(np.float32) for metric in TOKEN_METRICS}
        tokens["kl_to_teacher"] *= np.float32(factor)
        tokens |= {"row": row, "column": column, "position": column, "label": rows[:, 1:].ravel()}
        tokens |= {top: rows[:, :-1].ravel() for top in ("student_top", "teacher_top")}
        about = {"name": name, "model": "m", "formats": "9 nvfp4", "precision": "bfloat16", "tokens_sha256": "a"}
        return Evaluation(about | {"num_tokens": len(row)}, tokens, rows[:, :-1])

    return make


def make_run(name: str, kls: dict[int, float], losses=(), **more) -> Run:
    scalars = {f"validation/{metric}": list(kls.items()) for metric in ("kl_to_teacher", "cross_entropy")}
    scalars |= {loss: [(i, 4.0 / i) for i in range(1, 30)] for loss in losses} | {"learning-rate": [(1, 1e-4)]}
    last = max(kls)
    validation = {"kl_to_teacher": kls[last], "cross_entropy": kls[last], "top1_agreement": 0.9, "iteration": last}
    return Run(name, f"runs/{name}", scalars, validation | {"num_tokens": 640}, None, None, **more)


def make_results(**more) -> Results:
    runs = [make_run("PTQ", {0: 0.4}), make_run(EVIL, {29: 0.1}, ["kl loss", "ce loss"], seconds=7200.0)]
    return Results(EVIL, EVIL, MODEL, runs, [], [EVIL], **more)


def hybrid_policy(job_policy: str, overrides=()) -> RunPolicy:
    """The policy map of a model with a Mamba, an expert, an attention and an MLP layer."""
    layer = "backbone.layers.{}.mixer."
    linears = [
        *(_linear("decoder.layers.0.mixer.in_proj", layer.format(0) + "in_proj", "mamba", 0),),
        *(
            _linear(f"decoder.layers.1.mlp.experts.{e}.fc1", f"{layer.format(1)}experts.{e}.up_proj", "expert", 1)
            for e in range(4)
        ),
        _linear("decoder.layers.2.self_attention.linear_qkv", layer.format(2) + "q_proj", "attention", 2),
        _linear("decoder.layers.3.mlp.linear_fc1", layer.format(3) + "up_proj", "mlp", 3),
        _linear("output_layer", "lm_head", "head", None),
    ]
    kinds = ["mamba", "expert", "attention", "mlp"]
    formats = policies.resolve(policies.load(job_policy, list(overrides)), linears, kinds)
    rows = dict(zip((x.megatron for x in linears), format_rows(linears, formats), strict=True))
    return RunPolicy(("QAD",), job_policy, "fp8", rows, linear_grid(linears), 1000)


def _linear(megatron: str, hf: str, kind: str, layer: int | None) -> ParamMapping:
    return ParamMapping(f"{megatron}.weight", (f"{hf}.weight",), kind, (64, 32), layer, is_linear=True)


def test_text_from_files_stays_text(comparison):
    policy = hybrid_policy("nvfp4-all-linear")
    policy = SimpleNamespace(**vars(policy) | {"name": EVIL, "bytes_before": 9, "bytes_after": 3})
    export = Export("my dir/<b>", "modelopt", EVIL, "29", 10**6)
    text = html(make_results(comparison=comparison, exports=[export], policies=[policy]), [Section(EVIL, EVIL)])
    assert "<script" not in text.lower() and "/<b>" not in text
    page = Elements(text)
    assert page.text.count("<script>alert('x')</script>") > 10
    assert "vllm serve 'my dir/<b>'" in page.text
    # A line break in the context of a token is shown.
    assert f"{EVIL}\u23ce" in page.text


def test_page_refers_to_nothing_outside(comparison):
    text = html(make_results(comparison=comparison, policies=[hybrid_policy("nvfp4-all-linear")]))
    page = Elements(text)
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    tags = {tag for tag, _ in page.found}
    assert "svg" in tags and not tags & {"script", "link", "img", "iframe", "image", "object", "embed"}
    links = [attrs[name] for _, attrs in page.found for name in ("href", "src") if name in attrs]
    ids = [attrs["id"] for _, attrs in page.found if "id" in attrs]
    assert links and {link.removeprefix("#") for link in links} <= set(ids)
    assert len(ids) == len(set(ids))
    assert {match for match in re.findall(r"url\(#([^)]*)\)", text)} <= set(ids)


def test_equal_inputs_give_equal_pages(comparison):
    results = make_results(comparison=comparison, policies=[hybrid_policy("nvfp4-all-linear")])
    assert html(results) == html(results)


def test_comparison_has_intervals_positions_classes_and_worst_tokens(comparison):
    page = Elements(html(make_results(comparison=comparison)))
    record = comparison["evaluations"][1]
    mean = record["means"]["kl_to_teacher"]
    assert f"{mean['low']:.4g} to {mean['high']:.4g}" in page.text
    # The second KL is a quarter of the first for every token, so the ratio has no spread.
    assert "0.2500.250 to 0.250" in page.text
    for expected in ("KL by position in the text", "KL by class of the predicted token", "99.9 % of tokens below"):
        assert expected in page.text
    assert sum(tag == "mark" for tag, _ in page.found) == 2 * 5


def test_without_records_the_page_says_how_to_get_them():
    page = Elements(html(make_results()))
    assert "megatron-qad report --evaluations" in page.text and "Tokens with the largest KL" not in page.text
    assert "2.00 h" in page.text and "none named (--export DIR)" in page.text


def test_policy_map_of_a_hybrid():
    """Layers of different kinds have different linears; the experts of a layer share a cell."""
    policy = hybrid_policy("nvfp4-all-linear", ["attention=bf16", "expert=fp8"])
    text = html(make_results(policies=[policy]))
    cells = [attrs for tag, attrs in Elements(text).found if tag == "td" and attrs.get("class") == "format"]
    assert [cell["title"].split(" (")[0] for cell in cells] == [
        "layer 0, in_proj: nvfp4",
        "layer 1, up_proj: fp8",
        "layer 2, q_proj: bf16",
        "layer 3, up_proj: nvfp4",
        "head, lm_head: bf16",
    ]
    assert cells[1]["title"].endswith("(4 experts, each 64 x 32)") and cells[2]["style"] == "background: var(--color-0)"
    # 8 weights of 64 x 32 in BF16 and 1000 bytes of other tensors.
    assert policy.bytes_before == 8 * 64 * 32 * 2 + 1000 > policy.bytes_after


def test_heatmaps_of_weights_sensitivity_and_experts():
    grid = linear_grid([_linear("decoder.layers.0.x", "model.layers.0.mlp.up_proj", "mlp", 0)])
    error = LinearError("decoder.layers.0.x.weight", 0, (64, 32), 0.0912, {EVIL: RunWeight(0.1234, None)})
    sensitivity = {"num_tokens": 512, "everything": {"nvfp4": 0.3}}
    sensitivity["units"] = [
        {"name": f"decoder.layers.{i}.*", "format": "nvfp4", "kl": kl} for i, kl in enumerate((0.1, 0.0))
    ]
    results = make_results(sensitivity=sensitivity, grid=grid)
    results.linears = [error]
    load = {"teacher": [30, 10, 20, 20], "student": [32, 8, 20, 20], "compared": 40, "changed": 2}
    results.runs[1].experts = Experts({3: load})
    cells = [attrs["title"] for tag, attrs in Elements(html(results)).found if "heat" in attrs.get("class", "").split()]
    assert "layer 0, mlp up_proj: 9.12%" in cells and "layer 0, mlp up_proj: 12.34%" in cells
    assert "layer 0, format nvfp4: 0.1" in cells and "layer 1, format nvfp4: 0" in cells
    assert "expert 0, layer 3: 1.60" in cells and "expert 1, layer 3: 0.50" in cells


def test_hundred_layers_stay_small():
    """A grid of a hundred layers has no text in its cells, and the page stays below 2 MB."""
    names = ("q_proj", "o_proj", "up_proj", "down_proj")
    linears = [_linear(f"decoder.layers.{i}.{n}", f"model.layers.{i}.{n}", "mlp", i) for i in range(100) for n in names]
    rows = dict(
        zip((x.megatron for x in linears), format_rows(linears, {x.megatron: "nvfp4" for x in linears}), strict=True)
    )
    text = html(make_results(policies=[RunPolicy(("QAD",), "p", "bf16", rows, linear_grid(linears), 0)]))
    cells = re.findall(r'<td class="format"[^>]*>([^<]*)</td>', text)
    assert len(cells) == 400 and not any(cells) and len(text) < 2e6


def test_element_escapes_text_and_attributes():
    assert element("td", EVIL, title='"<') == f'<td title="&quot;&lt;">{markup(EVIL)}</td>'
    assert markup(["a", None, element("br")]) == "a<br>"


def test_families_have_one_cell_for_each_linear_of_a_layer():
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 120}
    grid = linear_grid(family_of(config).linears(config | {"tie_word_embeddings": False}))
    assert [(row.kind, row.label) for row in grid.rows] == [
        ("attention", "q_proj, k_proj, v_proj"),
        ("attention", "o_proj"),
        ("mlp", "gate_proj, up_proj"),
        ("mlp", "down_proj"),
        ("head", "lm_head"),
    ]
    assert list(grid.columns) == ["0", "1", "head"] and all(len(names) == 1 for names in grid.cells.values())
