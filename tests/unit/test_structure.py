"""Structure of the package: imports between subpackages, length of files, module-level state, effects of an import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_qad"
LEVELS = {
    "engine": 0,
    "formats": 1,
    "models": 2,
    "quantization": 2,
    "distillation": 2,
    "data": 2,
    "config": 3,
    "checkpoint": 3,
    "planning": 4,
    "training": 5,
    "hf_training": 5,
    "evaluation": 6,
    "report": 7,
    "cli": 8,
}
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400


def rooms_imported(source: str, module: str) -> set[str]:
    """Return the subpackages that a module imports, including relative imports and imports inside of functions."""
    subpackages = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: -node.level]
                base = ".".join([*package, base] if base else package)
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "megatron_qad" and len(parts) > 1 and parts[1] in LEVELS:
                subpackages.add(parts[1])
    return subpackages


def test_names_of_test_files_are_unique():
    """pytest imports them by their file names, because the folders are not packages."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))


def test_each_room_has_a_floor():
    subpackages = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert subpackages == set(LEVELS)
    assert sorted(path.name for path in PACKAGE.glob("*.py")) == ["__init__.py", "api.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_subpackages_import_lower_levels_only(file):
    relative = file.relative_to(ROOT).with_suffix("")
    subpackage = relative.parts[1] if len(relative.parts) > 2 else None
    imported = rooms_imported(file.read_text(), ".".join(relative.parts))
    if subpackage is None:
        assert not imported or relative.name == "api"  # the public names of all levels
        return
    wrong = {other for other in imported - {subpackage} if LEVELS[other] >= LEVELS[subpackage]}
    assert not wrong, f"{relative} is on level {LEVELS[subpackage]} and imports {sorted(wrong)}"


@pytest.mark.parametrize(
    "source, expected",
    [
        ("import megatron_qad.training.loss", {"training"}),
        ("def f():\n    from megatron_qad import training, models", {"training", "models"}),
        ("from ..report import table", {"report"}),
        ("from .. import report", {"report"}),
        ("from .weights import x", {"quantization"}),
        ("import importlib\nimportlib.import_module('megatron_qad.report.table')", {"report"}),
        ("import megatron.training", set()),
    ],
)
def test_imports_of_every_form_are_found(source, expected):
    assert rooms_imported(source, "megatron_qad.quantization.policy") == expected


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_are_short(file):
    assert len(file.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("module", ["megatron_qad", "megatron_qad.api"])
def test_importing_the_package_loads_neither_torch_nor_megatron(module):
    heavy = "{'torch', 'megatron', 'modelopt', 'transformers'}"
    code = f"import sys, {module}; print(sorted({{m.split('.')[0] for m in sys.modules}} & {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_package_does_not_use_megatrons_global_arguments():
    """Code receives ``args`` as an argument instead of calling Megatron's ``get_args``."""
    assert not [str(file) for file in FILES if "get_args(" in file.read_text()]


STATE_OF_A_PROCESS = {
    "engine/run_directory/locks.py": {"_held"},  # the locks that this process holds
    "engine/run_directory/manifest.py": {"_verified"},  # checkpoints that it has read and found whole
    "data/prepare.py": {"_worker"},  # the tokenizer of a tokenizing process
    "checkpoint/worker_pool.py": {"_work"},  # the function that a worker process runs
}
"""Module-level state that belongs to a process. All other state is in attributes of a job's objects."""


def module_state(source: str) -> set[str]:
    """Return names of mutable module-level state: rebound with ``global``, or initialized with an empty container."""
    tree = ast.parse(source)
    names = {name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        elif isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        else:
            continue
        is_empty = isinstance(value, (ast.Dict, ast.List)) and not (
            getattr(value, "elts", None) or getattr(value, "keys", None)
        )
        call = getattr(getattr(value, "func", None), "id", "") if isinstance(value, ast.Call) and not value.args else ""
        if is_empty or call in ("set", "dict", "list", "deque", "defaultdict", "count", "Counter"):
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_modules_have_no_state():
    states = {str(f.relative_to(PACKAGE)): state for f in FILES if (state := module_state(f.read_text()))}
    assert states == STATE_OF_A_PROCESS


@pytest.mark.parametrize(
    "source, names",
    [
        ("seen = {}", {"seen"}),
        ("seen: set = set()", {"seen"}),
        ("n = 0\ndef f():\n    global n\n    n += 1", {"n"}),
        ("TABLE = {'a': 1}\nNAMES = ('a',)", set()),
    ],
)
def test_state_of_every_form_is_found(source, names):
    assert module_state(source) == names
