"""Runs vLLM's engine in the serving environment on exports."""

import json
import subprocess
from collections.abc import Collection
from pathlib import Path

import numpy as np


def serve(
    python: Path,
    env: dict,
    models: dict[str, tuple[Path, np.ndarray]],
    directory: Path,
    bf16_inputs: Collection[str] = (),
) -> dict[str, np.ndarray]:
    """Serve models, one after another in one process. Returns their log-probabilities [n, s, V] by name.

    models: directory and prompts by name
    bf16_inputs: names of models whose linears round their inputs to bfloat16 before they quantize them
    """
    requests = []
    for name, (model, prompts) in models.items():
        asked, output = directory / f"{name}.prompts.npy", directory / f"{name}.npy"
        np.save(asked, prompts)
        files = {"model": str(model), "prompts": str(asked), "output": str(output)}
        requests.append(files | {"bf16_inputs": name in bf16_inputs})
    (directory / "requests.json").write_text(json.dumps(requests))
    script = Path(__file__).with_name("vllm_logprobs.py")
    command = [python, script, directory / "requests.json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=directory)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    errors = [Path(r["output"] + ".error") for r in requests]
    assert not (texts := [e.read_text() for e in errors if e.exists()]), texts
    return {name: np.load(directory / f"{name}.npy") for name in models}
