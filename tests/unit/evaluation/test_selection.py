"""Selection of a checkpoint: killed and resumed, one candidate of an array, and what the choice says."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records
from megatron_qad.engine.run_directory.iterations import iteration_dir
from megatron_qad.engine.run_directory.run_files import BEST_FILE
from megatron_qad.evaluation.selection import find_candidates

ROOT = Path(__file__).parents[3]
# What a user's command may be: it writes the results of tools/benchmark.py, and notes that it ran.
EVALUATION = """
import pathlib, sys, time
from megatron_qad.evaluation import benchmark_results
iteration, results, log = int(sys.argv[1]), pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
with log.open("a") as stream:
    stream.write(f"{iteration}\\n")
if iteration == 300 and not log.with_suffix(".slow").exists():
    log.with_suffix(".slow").touch()
    time.sleep(600)
sampling = dict(chat=False, temperature=0.6, top_p=0.95, max_new_tokens=8, seed=1)
task = dict(runs=1, sampled=True, files={}, higher_is_better={"acc": True})
benchmark_results.start(results, dict(model={}, sampling=sampling, tasks={"t": task}))
right = {100: 10, 200: 38, 300: 37}[iteration]
lines = [dict(id=i, problem=str(i), prompt="", scores={"acc,none": float(i < right)}) for i in range(40)]
benchmark_results.write_run(results, "t", 0, lines)
"""


@pytest.fixture
def run(tmp_path) -> Path:
    """A run that has kept three checkpoints; iteration 300 has the second lowest KL."""
    directory = tmp_path / "run"
    for iteration in (100, 200, 300):
        (directory / f"iter_{iteration:07d}").mkdir(parents=True)
        (directory / f"iter_{iteration:07d}" / ".metadata").touch()
    kls = {100: 0.1, 300: 0.2, 200: 0.3, 400: 0.4}  # 400 was removed
    json_records.write(directory / BEST_FILE, [{"iteration": i, "kl_to_teacher": kl} for i, kl in kls.items()])
    return directory


def start(run: Path, *flags: str, **more) -> subprocess.Popen:
    script = run.parent / "evaluation.py"
    script.write_text(EVALUATION)
    command = f"{sys.executable} {script} {{iteration}} {{results}} {run.parent}/log"
    argv = [sys.executable, str(ROOT / "tools/select_checkpoint.py"), "--run", str(run), "--output"]
    argv += [str(run.parent / "selection"), "--command", command, *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | more
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def test_tasks_of_an_array_begin_at_the_same_time(run, tmp_path):
    """Every task reads the candidates, whichever task wrote the file."""
    num_tasks = 8
    barrier = threading.Barrier(num_tasks)

    def begin(output: Path) -> list:
        barrier.wait()
        found = find_candidates(run, output, {"command": "x"})
        found[0].directory.mkdir(exist_ok=True)  # as its evaluation does next
        return [candidate.iteration for candidate in found]

    with ThreadPoolExecutor(num_tasks) as pool:
        for attempt in range(40):
            output = tmp_path / f"selection{attempt}"
            assert [*pool.map(begin, [output] * num_tasks)] == [[100, 300, 200]] * num_tasks
            assert {path.name for path in output.iterdir()} == {"candidates.json", "iter_0000100"}
    with pytest.raises(QADError, match="was started with"):
        find_candidates(run, output, {"command": "y"})


def test_a_killed_selection_evaluates_only_what_is_missing(run):
    with pytest.raises(QADError, match="Run megatron-qad select"):
        iteration_dir(run, "selected")
    process = start(run)
    while not (run.parent / "log.slow").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()  # the killed evaluation has ended, too: it would hold the pipe open
    log = run.parent / "log"
    assert log.read_text().split() == ["100", "300"]
    assert not (run / "selection.json").exists()

    array = start(run, SLURM_ARRAY_TASK_ID="2")
    output = array.communicate()[0]
    assert array.returncode == 0 and log.read_text().split() == ["100", "300", "200"], output
    assert not (run / "selection.json").exists()

    process = start(run)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert log.read_text().split() == ["100", "300", "200", "300"]
    selection = json_records.read(run / "selection.json")
    assert selection["iteration"] == 200 and selection == json_records.read(run.parent / "selection/selection.json")
    assert [entry["iteration"] for entry in selection["candidates"]] == [100, 300, 200]
    # One of 40 problems differs from 300: the interval of that difference contains 0; 28 differ from 100.
    assert "within noise of iteration 300:" in selection["why"] and selection["why"] in output
    assert selection["candidates"][0]["difference_to_best"]["high"] < 0
    assert iteration_dir(run, "selected").name == "iter_0000200"

    other = start(run, "--layout", "bf16")
    output = other.communicate()[0]
    assert other.returncode == 1 and "was started with" in output and "Traceback" not in output
    assert json.loads((run / "selection.json").read_text())["content"]["iteration"] == 200
