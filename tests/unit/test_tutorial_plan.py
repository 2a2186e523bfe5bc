"""The tutorials quote what the planner prints today."""

import re
from pathlib import Path

import pytest
from shell_commands import commands_of

from megatron_qad.cli.commands import plan_command

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "tests/unit/quantization/configs_of_recipes/qwen3-8b.json"


@pytest.mark.parametrize("name", ["tutorial.md", "tutorial_slurm.md"])
def test_tutorials_quote_the_plan(name, capsys):
    page = ROOT / "docs" / name
    command = next(command for command in commands_of(page) if command.words[:2] == ("megatron-qad", "plan"))
    argv = list(command.words[2:])
    argv[argv.index("--hf-model") + 1] = str(CONFIG)
    plan_command.main(argv)
    printed = capsys.readouterr().out.splitlines()
    quoted = re.search(r"```text\n(.*?)```", page.read_text(), re.DOTALL).group(1).splitlines()
    assert len(quoted) >= 4
    assert not [line for line in quoted if line not in printed]
