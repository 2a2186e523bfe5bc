"""The table of patches agrees with the installed packages and with our own sources."""

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

from megatron_qad.engine import patches, patches_page
from megatron_qad.engine.patches import PATCHES, replace, restore
from megatron_qad.engine.tried_versions import supported_versions

ROOT = Path(__file__).parents[3]
FOREIGN = ("torch", "megatron", "transformers", "modelopt", "tensorboard", "wandb", "accelerate")

SOURCES = """
import json, sys
from megatron_qad.engine.patches import PATCHES, owner_of, source_of
sources = [[source_of(owner_of(patch.owner), name) for name in patch.names] for patch in PATCHES]
print(json.dumps(sources))
"""


@pytest.fixture(scope="module")
def sources() -> list[list[str]]:
    """The sources of every row, read in a process in which nothing is replaced yet."""
    command = [sys.executable, "-W", "ignore", "-c", SOURCES]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert not done.returncode, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("index", range(len(PATCHES)), ids=[f"{p.owner}:{p.names[0]}" for p in PATCHES])
def test_row_matches_installed_package(sources, index):
    """If this fails after an upgrade: read upstream's change, fix the patch or drop it, and enter the new values."""
    patch = PATCHES[index]
    if "mamba_context_parallel" in patch.owner and importlib.util.find_spec("transformer_engine"):
        pytest.skip("with Transformer Engine the module has the real function")
    assert tuple(sources[index]) == patch.sources
    assert version(patch.package).startswith((patch.version, *supported_versions(patch.package)))
    assert patch.why and patch.until
    file = ROOT / patch.where if patch.where.startswith("launch/") else ROOT / "megatron_qad" / patch.where
    text = file.read_text()
    assert patch.names[0] in text and patch.owner.replace(":", ".").rpartition(".")[2] in text


def test_attribute_without_row_cannot_be_replaced():
    with pytest.raises(LookupError, match="has no row"):
        replace("json:dumps", lambda upstream: upstream)


def test_second_replacement_receives_the_original(monkeypatch):
    from torch.distributed.checkpoint import filesystem

    monkeypatch.setattr(filesystem, "pickle", filesystem.pickle)
    seen = []

    class New:
        pass

    for _ in range(2):
        replace("torch.distributed.checkpoint.filesystem:pickle", lambda upstream: seen.append(upstream) or New())
    assert seen[0] is seen[1] and isinstance(filesystem.pickle, New)


def test_missing_attribute_is_an_error(monkeypatch):
    """A version that renames a function must not lose its events silently."""
    from megatron.training import training

    monkeypatch.delattr(training, "train_step")
    with pytest.raises(AttributeError, match="train_step"):
        replace("megatron.training.training:train_step", lambda upstream: upstream)


def test_wrapper_around_our_replacement_is_kept(monkeypatch):
    """``functools.wraps`` copies the mark of our replacement."""
    monkeypatch.setattr(torch.distributed, "all_gather", torch.distributed.all_gather)
    target = "torch.distributed:all_gather"
    replace(target, lambda upstream: functools.partial(upstream))
    ours = torch.distributed.all_gather

    @functools.wraps(ours)
    def wrapper(*args):
        return ours(*args)

    torch.distributed.all_gather = wrapper
    seen = []
    replace(target, lambda upstream: seen.append(upstream) or ours)
    assert seen == [wrapper]
    restore(target)


def foreign_assignments(source: str) -> list[int]:
    """Return the lines that assign to an attribute of another package's module or class, or call ``setattr`` on one."""
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


def test_replacements_only_go_through_the_table():
    """Allowed: Megatron's global variables for its writers, which are meant to be set."""
    allowed = {"engine/loggers.py": 2}
    for file in sorted((ROOT / "megatron_qad").rglob("*.py")):
        name = str(file.relative_to(ROOT / "megatron_qad"))
        lines = foreign_assignments(file.read_text())
        assert len(lines) == allowed.get(name, 0), f"{name}: lines {lines}"


@pytest.mark.parametrize(
    "source, lines",
    [
        ("import torch\ntorch.cuda.stream = 3", [2]),
        ("from torch import cuda\ncuda.stream, x = 3, 4", [2]),
        ("from megatron.core import mpu as m\nsetattr(m, 'x', 1)", [2]),
        ("import torch\nx = torch.ones(1)\nx.grad = None", []),
    ],
)
def test_parser_finds_every_form_of_replacement(source, lines):
    assert foreign_assignments(source) == lines


def test_page_shows_the_table():
    assert (ROOT / "docs" / "patches.md").read_text() == patches_page.page()


def test_stand_ins_are_installed_where_the_page_says():
    for stand_in in patches.STAND_INS:
        assert f'"{stand_in.module}"' in (ROOT / "megatron_qad" / stand_in.where).read_text()


def test_at_most_four_functions_of_the_loop_are_replaced():
    """The row of the loggers in the same module does not count: it replaces a helper that the module imports."""
    rows = [patch for patch in PATCHES if patch.owner == "megatron.training.training" and "loop" in patch.where]
    assert sum(len(patch.names) for patch in rows) <= 4
