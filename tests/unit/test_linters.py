"""The hooks for commits are the linters of ``make lint``."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def test_hooks_are_the_linters_of_make_lint():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = [hook["entry"] for hook in repository["hooks"]]
    rule = re.search(r"^lint: env\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE).group(1)
    # The last command of a line, without the environment and the files.
    commands = [re.split(r"\$\(RUN\) (?:xargs )?", line)[-1] for line in rule.splitlines()]
    for hook, command in zip(hooks, commands, strict=True):
        assert command.startswith(hook), (hook, command)
    assert all(hook["language"] == "system" for hook in repository["hooks"])  # the versions that pyproject.toml pins
