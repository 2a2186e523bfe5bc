"""The serving environment and the students that all serving tests share."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import students
from launch import ROOT

VLLM_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",  # compiling the counts of ranks of log-probabilities takes a minute
}


@pytest.fixture(scope="session")
def serving_python() -> Path:
    """Python of the serving environment, which is created if there is none."""
    if os.environ.get("QAD_NO_SERVE"):
        pytest.skip("QAD_NO_SERVE is set: no engine serves an export")
    setup = subprocess.run([ROOT / "tools/setup_serving_env.sh"], capture_output=True, text=True)
    assert setup.returncode == 0, setup.stderr[-4000:]
    return Path(setup.stdout.strip()) / "bin" / "python"


@pytest.fixture(scope="session")
def serving_env() -> dict[str, str]:
    """Environment variables of vLLM's processes: its settings, and our plugin as the only path."""
    return os.environ | VLLM_SETTINGS | {"PYTHONPATH": str(ROOT / "tests/serve/vllm_plugin")}


@pytest.fixture(scope="session")
def run_script(serving_python):
    """``run_script(script, requests, directory)``: run tests/serve/SCRIPT with a list of requests in one process."""

    def call(script: str, requests: list[dict], directory: Path) -> None:
        file = directory / f"{script}.json"
        file.write_text(json.dumps(requests))
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [serving_python, ROOT / "tests/serve" / script, file]
        done = subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-4000:])

    return call


@pytest.fixture(scope="session")
def random_students(serving_python, server, tmp_path_factory) -> list[students.Student]:
    """One student per family, two steps from random weights."""
    return students.random_students(server, tmp_path_factory.mktemp("serving") / "random")


@pytest.fixture(scope="session")
def text_student(serving_python, server, tmp_path_factory) -> students.Student:
    """A Llama trained on text, with a tokenizer, a chat template and a generation config."""
    return students.text_student(server, tmp_path_factory.mktemp("serving") / "text")
