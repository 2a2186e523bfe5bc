"""The table of patches against the installed packages, and against our own sources."""

import ast
import functools
import importlib.util
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from megatron_qad.engine import patches
from megatron_qad.engine.patches import PATCHES, replace, restore

ROOT = Path(__file__).parents[3]
FOREIGN = ("torch", "megatron", "transformers", "modelopt", "tensorboard", "wandb", "accelerate")

SOURCES = """
import json, sys
from megatron_qad.engine.patches import PATCHES, owner_of, source_of
found = [[source_of(owner_of(patch.owner), name) for name in patch.names] for patch in PATCHES]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def sources() -> list[list[str]]:
    """Of every row, read in a process in which nothing is replaced yet."""
    command = [sys.executable, "-W", "ignore", "-c", SOURCES]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert not done.returncode, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("number", range(len(PATCHES)), ids=[f"{p.owner}:{p.names[0]}" for p in PATCHES])
def test_what_a_row_names_is_what_it_was_written_for(sources, number):
    """If this fails after an upgrade: read upstream's change, mend the patch or drop it, and enter the new values."""
    patch = PATCHES[number]
    if "mamba_context_parallel" in patch.owner and importlib.util.find_spec("transformer_engine"):
        pytest.skip("with Transformer Engine the module has the real function")
    assert tuple(sources[number]) == patch.sources
    assert version(patch.package).startswith(patch.version)
    assert patch.why and patch.until
    file = ROOT / patch.where if patch.where.startswith("launch/") else ROOT / "megatron_qad" / patch.where
    text = file.read_text()
    assert patch.names[0] in text and patch.owner.replace(":", ".").rpartition(".")[2] in text


def test_only_what_is_in_the_table_can_be_replaced():
    with pytest.raises(LookupError, match="has no row"):
        replace("json:dumps", lambda upstream: upstream)


def test_a_second_replacement_starts_from_upstream_again(monkeypatch):
    from torch.distributed.checkpoint import filesystem

    monkeypatch.setattr(filesystem, "pickle", filesystem.pickle)
    seen = []

    class Mine:
        pass

    for _ in range(2):
        replace("torch.distributed.checkpoint.filesystem:pickle", lambda upstream: seen.append(upstream) or Mine())
    assert seen[0] is seen[1] and isinstance(filesystem.pickle, Mine)


def test_what_is_not_there_is_not_replaced(monkeypatch):
    """A version that renames a function must not lose its events without a word."""
    from megatron.training import training

    monkeypatch.delattr(training, "train_step")
    with pytest.raises(AttributeError, match="train_step"):
        replace("megatron.training.training:train_step", lambda upstream: upstream)


def test_a_wrapper_around_ours_is_kept(monkeypatch):
    """``functools.wraps`` copies our mark."""
    monkeypatch.setattr(torch.distributed, "all_gather", torch.distributed.all_gather)
    target = "torch.distributed:all_gather"
    replace(target, lambda upstream: functools.partial(upstream))
    ours = torch.distributed.all_gather

    @functools.wraps(ours)
    def theirs(*args):
        return ours(*args)

    torch.distributed.all_gather = theirs
    seen = []
    replace(target, lambda upstream: seen.append(upstream) or ours)
    assert seen == [theirs]
    restore(target)


def foreign_assignments(source: str) -> list[int]:
    """Lines that assign to an attribute of a module or class of another package, or call ``setattr`` on one."""
    tree = ast.parse(source)
    foreign = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(alias.asname or alias.name.partition(".")[0], alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(alias.asname or alias.name, node.module or "") for alias in node.names]
        else:
            continue
        foreign |= {name for name, module in names if module.partition(".")[0] in FOREIGN}
    lines = []
    for node in ast.walk(tree):
        targets = []
        if isinstance(node, ast.Assign):
            parts = [part for target in node.targets for part in ast.walk(target)]
            targets = [p for p in parts if isinstance(p, ast.Attribute) and isinstance(p.ctx, ast.Store)]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr":
            targets = [ast.Attribute(node.args[0], "")]
        for target in targets:
            root = target.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in foreign:
                lines.append(node.lineno)
    return lines


def test_nothing_is_replaced_past_the_table():
    """What is set and not replaced: Megatron's own slots for the writers that its callers make."""
    allowed = {"engine/loggers.py": 2}
    for file in sorted((ROOT / "megatron_qad").rglob("*.py")):
        name = str(file.relative_to(ROOT / "megatron_qad"))
        found = foreign_assignments(file.read_text())
        assert len(found) == allowed.get(name, 0), f"{name}: lines {found}"


@pytest.mark.parametrize(
    "source, lines",
    [
        ("import torch\ntorch.cuda.stream = 3", [2]),
        ("from torch import cuda\ncuda.stream, x = 3, 4", [2]),
        ("from megatron.core import mpu as m\nsetattr(m, 'x', 1)", [2]),
        ("import torch\nx = torch.ones(1)\nx.grad = None", []),
    ],
)
def test_the_parser_sees_replacements_of_every_form(source, lines):
    assert foreign_assignments(source) == lines


def test_the_page_is_the_table():
    assert (ROOT / "docs" / "patches.md").read_text() == patches.page()


def test_stand_ins_are_put_where_the_page_says():
    for stand_in in patches.STAND_INS:
        assert f'"{stand_in.module}"' in (ROOT / "megatron_qad" / stand_in.where).read_text()


def test_at_most_four_functions_of_the_loop_are_replaced():
    """Loggers have a row for a helper that the loop's module imports; it is no part of the loop."""
    of_loop = [patch for patch in PATCHES if patch.owner == "megatron.training.training" and "loop" in patch.where]
    assert sum(len(patch.names) for patch in of_loop) <= 4
