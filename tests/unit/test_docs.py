"""What the documents name exists: linked files, tests, flags, and the messages that pages quote."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from megatron_qad.config.qad_options import QADOptions

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
# These pages tell what was: flags, files and tests of their time.
HISTORY = {"CHANGELOG.md", "lab_log.md"}
CODE = [*ROOT.glob("*.py"), *(ROOT / "megatron_qad").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
CODE += [
    file
    for folder in ("launch", "examples")
    for file in (ROOT / folder).rglob("*")
    if file.suffix in (".py", ".sh", ".sbatch")
]


def texts(file: Path) -> list[str]:
    """The strings of a Python file, a placeholder for each value in an f-string; the lines of any other file."""
    if file.suffix != ".py":
        return file.read_text().splitlines()
    strings = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.JoinedStr):
            strings.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.append(node.value)
    return strings


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    if page.name in HISTORY or page.parent.name == "howto":  # the guides add files
        return
    for path in re.findall(r"`((?:megatron_qad|tests|tools|launch|examples|docs)/[\w/]+\.\w+)", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name not in HISTORY], ids=lambda page: str(page.relative_to(ROOT))
)
def test_flags(page):
    flags = {f"--{name.replace('_', '-')}" for name in QADOptions.__dataclass_fields__}
    named = set(re.findall(r"--qad-[a-z-]+[a-z]", page.read_text())) - {"--qad-"}
    assert named <= flags, named - flags


def test_tests_that_the_failure_modes_name():
    text = (ROOT / "docs" / "failure_modes.md").read_text()
    for path, function in re.findall(r"`((?:unit|dist|slurm|e2e)/[\w/]+\.py)(?:::(\w+))?`", text):
        file = ROOT / "tests" / path
        assert file.is_file(), path
        assert f"def {function}" in file.read_text(), f"{path}::{function}"


@pytest.mark.parametrize("page, column, width", [("failure_modes.md", 1, 4), ("troubleshooting.md", 0, 3)])
def test_messages_that_pages_quote(page, column, width):
    """Three words in a row of each phrase occur in the code; between others the code may insert a value."""
    code, missing = "\n".join(text for file in CODE for text in texts(file)), []
    foreign = ("srun: ", "slurmstepd", "ERROR: TensorBoard in DIR: [Errno")  # messages of SLURM and of the system
    for row in (ROOT / "docs" / page).read_text().splitlines():
        cells = row.split(" | ")
        if len(cells) < width:
            continue
        for quotation in re.findall(r"`([^`]+)`", cells[column]):
            if quotation.startswith(foreign) or " " not in quotation:
                continue
            # Names in capitals, numbers and punctuation stand for values, or stand next to them.
            for phrase in re.split(r"\b[A-Z][A-Z_]*\b|[^a-zA-Z ,'-]+|\w*\d\w*|\bof decoder\b|\biter_", quotation):
                words = phrase.split()
                trigrams = [" ".join(words[i : i + 3]) for i in range(len(words) - 2)]
                if trigrams and not any(trigram in code for trigram in trigrams):
                    missing.append(f"{quotation!r}: {phrase!r} is not in the code")
    assert not missing, "\n".join(missing)


def test_changelog_names_the_version():
    version = re.search(r'__version__ = "([^"]+)"', (ROOT / "megatron_qad" / "__init__.py").read_text()).group(1)
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_readme_is_at_most_120_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_prose_check_finds_banned_phrases(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("A file beside the others.\nA file next to the others.\n`beside`\n")  # prose: ok
    command = ["python", str(ROOT / "tools" / "check_prose.py"), str(page)]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 1 and checked.stdout.count("\n") == 1
    assert f"{page}:1: 'beside'" in checked.stdout  # prose: ok
