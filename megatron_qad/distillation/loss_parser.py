"""Parses ``--qad-loss``, a short string or a YAML file, into ``WeightedLosses``.

    kl      kl + 0.5*ce      jsd(beta=0.5)      topk(k=64, temperature=2)      kl + cosine(1, 0, 100, 500)*ce
    kl + 0.1*hidden_mse(layers=[3, -1])         kl + 1e-4*scale_growth

A weight is a number, linear(FROM, TO, START, END) or cosine(FROM, TO, START, END). A schedule is FROM until step START
and TO from step END on. The same in YAML is a list:

    - loss: kl
      temperature: 2
    - loss: ce
      weight: {schedule: cosine, start_weight: 1, end_weight: 0, start: 100, end: 500}
"""

import ast
from collections.abc import Mapping
from dataclasses import Field, fields
from pathlib import Path

from megatron_qad.distillation.loss_registry import REGISTRY, Loss, losses_of_type
from megatron_qad.distillation.vocab_parallel import LogitLoss
from megatron_qad.distillation.weighted_losses import Term, Weight, WeightedLosses, did_you_mean, is_number
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.text_files import read_yaml


def parse_loss(text: str, *, temperature: float = 1.0, name: str = "--qad-loss") -> WeightedLosses:
    """Parse ``--qad-loss``.

    Args:
        text: a loss as described in this module's docstring; a name ending in .yaml or .yml is read as a file.
        temperature: default temperature of the losses that have one.
        name: what errors call the loss.

    Raises:
        QADError: an unknown loss, setting or schedule (with the nearest valid name), an invalid value, or bad syntax.

    Example::

        losses = parse_loss("kl(temperature=2) + 0.5*ce")
        [term.name for term in losses.terms]  # ["kl", "ce"]
        [term.weight.at_step(1) for term in losses.terms]  # [1.0, 0.5]
    """
    try:
        parsed = _read_yaml(Path(text)) if text.endswith((".yaml", ".yml")) else _read_string(text)
        built = [(loss, _build(loss, settings, temperature), weight) for loss, settings, weight in parsed]
    except (QADError, ValueError) as error:
        raise QADError(f"{name} {text!r:.200}: {error}") from error
    except (RecursionError, MemoryError) as error:
        raise QADError(f"{name} {text!r:.200}: nested too deeply, or too many terms.") from error
    terms: list[Term] = []
    for title, loss, weight in built:
        num_earlier = sum(term.name.split()[0] == title for term in terms)
        terms.append(Term(f"{title} {num_earlier + 1}" if num_earlier else title, loss, weight))
    losses = WeightedLosses(tuple(terms))
    if not losses.terms_of_type(LogitLoss):
        logit_losses = ", ".join(losses_of_type(LogitLoss))
        raise QADError(f"{name} {text!r}: no loss of the logits among its terms. Add one of {logit_losses}.")
    return losses


_ParsedTerm = tuple[str, dict, Weight]  # name, settings, weight


def _build(name: str, settings: dict, temperature: float) -> Loss:
    if name not in REGISTRY:
        raise QADError(f"unknown loss {name!r}, expected one of {', '.join(REGISTRY)}{did_you_mean(name, REGISTRY)}")
    loss = REGISTRY[name].loss
    valid = {field.name for field in fields(loss) if field.init}
    for key in settings:
        if key not in valid:
            raise QADError(
                f"{name} has no setting {key!r}, its settings are {', '.join(sorted(valid)) or 'none'}"
                f"{did_you_mean(key, valid)}"
            )
    for field in fields(loss):
        if field.name in settings:
            _check_type(name, field, settings[field.name])
    default = {"temperature": temperature} if "temperature" in valid else {}
    return loss(**(default | settings))


def _check_type(name: str, field: Field, value: object) -> None:
    """Check the type of a setting. Losses check lists and the range of numbers themselves."""
    if field.type is bool and type(value) is not bool:
        expected = "true or false"
    elif field.type is int and type(value) is not int:
        expected = "an integer"
    elif field.type in (float, float | None) and not is_number(value) and not (value is None and field.default is None):
        expected = "a finite number"
    else:
        return
    raise QADError(f"{name}({field.name}={value!r:.100}): expected {expected}.")


def _read_string(text: str) -> list[_ParsedTerm]:
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise QADError("expected losses joined by +, such as kl+0.5*ce or jsd(beta=0.5).") from error
    nodes = []
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        nodes.append(tree.right)
        tree = tree.left
    return [_parse_term(node) for node in [tree, *reversed(nodes)]]


def _parse_term(node: ast.expr) -> _ParsedTerm:
    weight = Weight()
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        weight, node = _parse_weight(node.left), node.right
    if isinstance(node, ast.Name):
        return node.id, {}, weight
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.args:
            raise QADError(f"{ast.unparse(node)}: expected settings with names, such as jsd(beta=0.5).")
        names = [keyword.arg for keyword in node.keywords]
        if None in names or len(set(names)) < len(names):
            raise QADError(f"{ast.unparse(node):.200}: expected each setting once, such as jsd(beta=0.5).")
        return node.func.id, {keyword.arg: _literal(keyword.value) for keyword in node.keywords}, weight
    raise QADError(f"{ast.unparse(node)}: expected [WEIGHT *] LOSS or [WEIGHT *] LOSS(setting=value).")


def _parse_weight(node: ast.expr) -> Weight:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if len(node.args) != 4 or node.keywords:
            raise QADError(f"{ast.unparse(node)}: expected {node.func.id}(FROM, TO, START, END).")
        return Weight(*(_literal(arg) for arg in node.args), schedule=node.func.id)
    return _constant_weight(_literal(node))


def _constant_weight(value) -> Weight:
    if not is_number(value):
        raise QADError(f"weight {value!r:.100}: expected a finite number or a schedule.")
    return Weight(start_weight=float(value))


def _literal(node: ast.expr):
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise QADError(f"{ast.unparse(node)}: expected a number.") from error


def _read_yaml(file: Path) -> list[_ParsedTerm]:
    if not file.is_file():
        raise QADError("no such file.")
    entries = read_yaml(file, file.name)
    if not (isinstance(entries, list) and entries and all(isinstance(e, Mapping) and "loss" in e for e in entries)):
        raise QADError("expected a list of mappings, each with the key 'loss'.")
    terms = []
    for entry in entries:
        settings = {key: value for key, value in entry.items() if key not in ("loss", "weight")}
        weight = entry.get("weight", 1.0)
        if isinstance(weight, Mapping):
            valid = [name for name in Weight.__dataclass_fields__]
            if unknown := [key for key in weight if key not in valid]:
                nearest = did_you_mean(unknown[0], valid)
                raise QADError(f"weight has no key {unknown[0]!r}, its keys are {', '.join(valid)}{nearest}")
            weight = Weight(**({"schedule": "linear"} | weight))
        else:
            weight = _constant_weight(weight)
        if not isinstance(entry["loss"], str):
            raise QADError(f"loss {entry['loss']!r:.100}: expected the name of a loss.")
        terms.append((entry["loss"], settings, weight))
    return terms
