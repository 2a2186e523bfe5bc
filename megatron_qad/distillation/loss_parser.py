"""``--qad-loss``: a short string or a YAML file -> ``WeightedLosses``.

    kl      kl + 0.5*ce      jsd(beta=0.5)      topk(k=64, temperature=2)      kl + cosine(1, 0, 100, 500)*ce
    kl + 0.1*hidden_mse(layers=[3, -1])         kl + 1e-4*scale_growth

A weight is a number, or linear(FROM, TO, START, END) or cosine(FROM, TO, START, END): FROM until step START, TO from
step END on. The same in YAML, a list:

    - loss: kl
      temperature: 2
    - loss: ce
      weight: {schedule: cosine, start_weight: 1, end_weight: 0, start: 100, end: 500}
"""

import ast
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import yaml

from megatron_qad.distillation.loss_registry import REGISTRY, Loss, losses_of_kind
from megatron_qad.distillation.vocab_parallel import LogitLoss
from megatron_qad.distillation.weighted_losses import Term, Weight, WeightedLosses, did_you_mean
from megatron_qad.engine.errors import QADError


def parse_loss(text: str, *, temperature: float = 1.0) -> WeightedLosses:
    """Read ``--qad-loss``.

    Args:
        text: see the top of this file; a name ending in .yaml or .yml is a file.
        temperature: of the losses that have one and do not give it.

    Raises:
        QADError: an unknown loss, setting or schedule (the nearest is named), a value a loss refuses, or bad syntax.
    """
    try:
        terms = _read_yaml(Path(text)) if text.endswith((".yaml", ".yml")) else _read_string(text)
        built = [(name, _build(name, settings, temperature), weight) for name, settings, weight in terms]
    except (QADError, ValueError, TypeError) as error:
        raise QADError(f"--qad-loss {text!r}: {error}") from error
    found: list[Term] = []
    for name, loss, weight in built:
        number = sum(other.name.split()[0] == name for other in found)
        found.append(Term(f"{name} {number + 1}" if number else name, loss, weight))
    losses = WeightedLosses(tuple(found))
    if not losses.terms_of_type(LogitLoss):
        of_logits = ", ".join(losses_of_kind(LogitLoss))
        raise QADError(f"--qad-loss {text!r}: expected a loss of the logits ({of_logits}) among its parts")
    return losses


_ReadTerm = tuple[str, dict, Weight]


def _build(name: str, settings: dict, temperature: float) -> Loss:
    if name not in REGISTRY:
        raise QADError(f"unknown loss {name!r}{did_you_mean(name, REGISTRY)}; expected one of {', '.join(REGISTRY)}")
    loss = REGISTRY[name].loss
    valid = {field.name for field in fields(loss) if field.init}
    for key in settings:
        if key not in valid:
            raise QADError(
                f"{name} has no setting {key!r}{did_you_mean(key, valid)}; it has {', '.join(sorted(valid)) or 'none'}"
            )
    default = {"temperature": temperature} if "temperature" in valid else {}
    return loss(**(default | settings))


def _read_string(text: str) -> list[_ReadTerm]:
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise QADError("expected losses joined by +, such as kl+0.5*ce or jsd(beta=0.5)") from error
    terms = []
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        terms.append(tree.right)
        tree = tree.left
    return [_term(node) for node in [tree, *reversed(terms)]]


def _term(node: ast.expr) -> _ReadTerm:
    weight = Weight()
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        weight, node = _weight(node.left), node.right
    if isinstance(node, ast.Name):
        return node.id, {}, weight
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.args:
            raise QADError(f"{ast.unparse(node)}: settings need their names, such as jsd(beta=0.5)")
        return node.func.id, {keyword.arg: _value(keyword.value) for keyword in node.keywords}, weight
    raise QADError(f"{ast.unparse(node)}: expected [WEIGHT *] LOSS or LOSS(setting=value)")


def _weight(node: ast.expr) -> Weight:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if len(node.args) != 4 or node.keywords:
            raise QADError(f"{ast.unparse(node)}: expected {node.func.id}(FROM, TO, START, END)")
        return Weight(*(_value(arg) for arg in node.args), schedule=node.func.id)
    return _constant(_value(node))


def _constant(value) -> Weight:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise QADError(f"weight {value!r}: expected a number or a schedule")
    return Weight(start_weight=float(value))


def _value(node: ast.expr):
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise QADError(f"{ast.unparse(node)}: expected a number") from error


def _read_yaml(file: Path) -> list[_ReadTerm]:
    if not file.is_file():
        raise QADError("no such file")
    try:
        terms = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise QADError(f"not valid YAML: {error}") from error
    if not (isinstance(terms, list) and terms and all(isinstance(t, Mapping) and "loss" in t for t in terms)):
        raise QADError("expected a list of mappings, each with the key 'loss'")
    found = []
    for term in terms:
        settings = {key: value for key, value in term.items() if key not in ("loss", "weight")}
        weight = term.get("weight", 1.0)
        if isinstance(weight, Mapping):
            valid = [name for name in Weight.__dataclass_fields__]
            if unknown := [key for key in weight if key not in valid]:
                raise QADError(f"weight has no key {unknown[0]!r}{did_you_mean(unknown[0], valid)}")
            weight = Weight(**({"schedule": "linear"} | weight))
        else:
            weight = _constant(weight)
        found.append((str(term["loss"]), settings, weight))
    return found
