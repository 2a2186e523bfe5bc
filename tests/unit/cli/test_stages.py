"""Stages of ``megatron-qad run``: each runs once; failures, changed flags and requests to stop. Their names are those
of launch/pipeline.sbatch."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_qad.cli import launcher
from megatron_qad.cli.command_table import COMMANDS
from megatron_qad.cli.stages import STAGES, STOPPED, Stages
from megatron_qad.engine.errors import QADError

ROOT = Path(__file__).resolve().parents[3]
ONLY_IN_RUN = {"prepare", "plan", "select", "report"}
"""They need no SLURM job, or a decision of the user between two jobs (docs/decisions/launching_and_slurm.md)."""


def test_pipeline_has_the_stages_of_a_run_and_smoothing():
    """With the same names, commands and order."""
    script = (ROOT / "launch/pipeline.sbatch").read_text()
    cases = dict(re.findall(r'^ {4}(\w+)\) submit \1 .*?"\$\{run\[@\]\}" (\w+) ', script, re.MULTILINE | re.DOTALL))
    shared = {name: command for name, command in STAGES.items() if name not in ONLY_IN_RUN}
    assert list(cases) == ["import", "smooth", *list(shared)[1:]]
    assert cases == shared | {"smooth": "smooth"}
    assert f"stages=${{QAD_STAGES:-{' '.join(shared)}}}" in script
    assert f"^({'|'.join(cases)})$" in script and f"Expected {', '.join(cases)}." in script


def test_a_run_has_the_stages_of_the_table():
    source = (ROOT / "megatron_qad/cli/commands/run_command.py").read_text()
    assert re.findall(r'stages\.run\("(\w+)"', source) == list(STAGES)
    assert f"Stages: {', '.join(STAGES)}." in source and set(STAGES.values()) <= set(COMMANDS)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """The program of each stage: it notes its flag in the file "calls", and fails if the flag is "fail"."""
    file = tmp_path / "program.py"
    file.write_text(
        f"import sys\nopen({str(tmp_path / 'calls')!r}, 'a').write(sys.argv[1] + ' ')\nprint('flag', sys.argv[1])\n"
        "sys.exit(3 if sys.argv[1] == 'fail' else 0)\n"
    )
    monkeypatch.setattr(launcher, "command_line", lambda command, on_all_gpus=None: [sys.executable, str(file)])


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().split()


def test_a_finished_stage_is_skipped_and_a_changed_one_repeats_those_after_it(program, tmp_path, capfd):
    def run(first: str) -> None:
        stages = Stages(tmp_path / "log", 1)
        stages.run("ptq", [first])
        stages.run("qad", ["b"])

    run("a"), run("a")
    assert calls(tmp_path) == ["a", "b"]
    assert "qad: done before" in capfd.readouterr().out
    run("c")
    assert calls(tmp_path) == ["a", "b", "c", "b"]
    assert (tmp_path / "log" / "ptq.txt").read_text() == "flag a\nflag c\n"


def test_a_failed_stage_runs_again(program, tmp_path, capfd):
    for _ in range(2):
        with pytest.raises(QADError, match="ptq: ended with status 3; its output is above and in .*ptq.txt"):
            Stages(tmp_path / "log", 1).run("ptq", ["fail"])
    assert calls(tmp_path) == ["fail", "fail"]
    assert "flag fail" in capfd.readouterr().out


def test_a_stage_that_did_not_reach_its_end_is_not_done(program, tmp_path):
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            Stages(tmp_path / "log", 1).run("ptq", ["a"], until=lambda: False)
        assert ended.value.code == STOPPED
    assert calls(tmp_path) == ["a", "a"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_to_stop_is_passed_on(tmp_path, number):
    """The stage ends by itself with status 0, as a training job that has saved; the run is then not done."""
    stage = tmp_path / "stage.py"
    stage.write_text(
        "import signal, sys, time\n"
        f"signal.signal({int(number)}, lambda *_: (print('saved'), sys.exit(0)))\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    code = (
        "import sys\nfrom pathlib import Path\nfrom megatron_qad.cli import launcher, stages\n"
        f"launcher.command_line = lambda command, on_all_gpus=None: [sys.executable, {str(stage)!r}]\n"
        f"stages.Stages(Path({str(tmp_path / 'log')!r}), 1).run('ptq', [])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line == "ready\n":
            process.send_signal(number)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=60) == STOPPED
    assert "saved" in rest and "ptq was stopped. The same command continues from here." in rest
    assert not (tmp_path / "log" / "ptq.done").exists()


def test_a_stage_ends_with_the_run(tmp_path):
    stage = tmp_path / "stage.py"
    stage.write_text("import os, time\nprint('pid', os.getpid(), flush=True)\ntime.sleep(60)\n")
    code = (
        "import sys\nfrom pathlib import Path\nfrom megatron_qad.cli import launcher, stages\n"
        f"launcher.command_line = lambda command, on_all_gpus=None: [sys.executable, {str(stage)!r}]\n"
        f"stages.Stages(Path({str(tmp_path / 'log')!r}), 1).run('ptq', [])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = next(int(line.split()[1]) for line in process.stdout if line.startswith("pid "))
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():
        if Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z":  # not yet reaped by init
            break
        time.sleep(0.1)
    else:
        assert not Path(f"/proc/{pid}").exists()


def test_environment_names_this_interpreter_first():
    environ = launcher.environment(3)
    assert environ["NPROC_PER_NODE"] == "3"
    assert environ["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


@pytest.mark.parametrize("on_terminal", [True, False])
def test_a_stage_has_a_terminal_if_the_run_has_one(tmp_path, on_terminal):
    """Progress bars are shown on a terminal only."""
    stage = tmp_path / "stage.py"
    stage.write_text("import sys\nprint('terminal', sys.stdout.isatty(), sys.stderr.isatty())\n")
    code = (
        "import sys\nfrom pathlib import Path\nfrom megatron_qad.cli import launcher, stages\n"
        f"launcher.command_line = lambda command, on_all_gpus=None: [sys.executable, {str(stage)!r}]\n"
        f"stages.Stages(Path({str(tmp_path / 'log')!r}), 1).run('ptq', [])\n"
    )
    output, end = pty.openpty() if on_terminal else os.pipe()
    with os.fdopen(output, "rb", buffering=0), subprocess.Popen([sys.executable, "-c", code], stdout=end) as process:
        os.close(end)
        assert process.wait(timeout=60) == 0
        shown = os.read(output, 1 << 16).decode()
    assert f"terminal {on_terminal} {on_terminal}" in shown
    assert f"terminal {on_terminal}" in (tmp_path / "log" / "ptq.txt").read_text()
