"""``megatron-qad run`` from a wheel installed outside the checkout: one command makes an export that vLLM serves, and a
report, from a random Qwen2 and 2,000 chats. In ``make test-all`` it is killed in every stage."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import openai
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from vllm_server import NAME, server_of

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,  # of 32 elements: vLLM on a CPU has no kernel for 16
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "initializer_range": 0.2,  # so that the model's distributions are not uniform
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STAGES = ["prepare", "import", "plan", "ptq", "qad", "select", "export", "validate", "report"]
WRITES = {"prepare": "data/*", "import": "teacher*/*", "export": "hf-modelopt*/*", "report": "report/*"}
"""Files of a stage, the first of which is a sign that it works."""
SAYS = {"ptq": "building the training", "qad": " | iteration 3/4 |", "select": "evaluated 1 of"}
"""What jobs say in the middle of their work: QAD has then saved iteration 2."""
JOB = ["--train-iters", "4", "--eval-interval", "2", "--save-interval", "2", "--qad-calibration-samples", "4"]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The console script of a fresh environment with the wheel, and this environment's other packages."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    source.mkdir()
    for name in ("megatron_qad", "launch"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "pretrain_qad.py"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", directory, source], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory / "venv"], check=True)
    python = directory / "venv" / "bin" / "python"
    (wheel,) = directory.glob("*.whl")
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], check=True)
    packages = sysconfig.get_path("purelib", vars={"base": directory / "venv", "platbase": directory / "venv"})
    # Only adds a path: the .pth files in it, such as that of the editable install, are not read.
    Path(packages, "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return directory / "venv" / "bin" / "megatron-qad"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A random Qwen2 with a tokenizer of bytes and a chat template, and 2,000 chats."""
    directory = tmp_path_factory.mktemp("inputs")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {word: i for i, word in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATE,
    ).save_pretrained(directory / "hf")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**CONFIG, eos_token_id=vocab["<|im_end|>"])
    transformers.Qwen2ForCausalLM(config).bfloat16().save_pretrained(directory / "hf")
    draw = random.Random(0)
    with open(directory / "chats.jsonl", "w") as file:
        for _ in range(2000):
            a, b = draw.randrange(1000), draw.randrange(1000)
            messages = [{"role": "user", "content": f"{a} + {b}"}, {"role": "assistant", "content": f"{a + b}"}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return directory


def start(command, inputs, work, *flags, output=subprocess.PIPE):
    """Start a run from a directory that is not the checkout, without its variables."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = ["--model", inputs / "hf", "--chats", inputs / "chats.jsonl", "--output", work, "--gpus", "2", *JOB]
    return subprocess.Popen(
        [command, "run", *words, *flags],
        cwd=inputs,
        env=environ,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
    )


def stages_in(output: str, text: str) -> list[str]:
    return re.findall(rf"^\[ *\d+ s\] (\w+){re.escape(text)}", output, flags=re.MULTILINE)


def check(work: Path, output: str) -> None:
    assert output.endswith(f"vllm serve {work}/hf-modelopt\n"), output[-4000:]
    assert f"{work}/hf-modelopt: valid; layout modelopt" in (work / "log" / "validate.txt").read_text()
    results = json.loads((work / "report" / "results.json").read_text())
    assert (work / "report" / "report.html").is_file() and "QAD" in json.dumps(results)
    # 1 % of 2,000 chats is held out, and the whole of it is evaluated.
    assert re.search(r"PTQ: KL 0\.\d+ nats per token, top-1 agreement \d", output)
    assert (work / "qad" / "latest_checkpointed_iteration.txt").read_text() == "4"


@pytest.mark.timeout(1800)
def test_one_command_makes_a_valid_export_and_a_report_and_is_done_once(command, inputs, tmp_path, request):
    work = tmp_path / "work"
    output = start(command, inputs, work).communicate()[0]
    check(work, output)
    assert stages_in(output, " (log:") == STAGES
    again = start(command, inputs, work).communicate()[0]
    check(work, again)
    assert stages_in(again, ": done before") == STAGES and not stages_in(again, " (log:")
    if os.environ.get("QAD_NO_SERVE"):
        return
    python, env = (request.getfixturevalue(name) for name in ("serving_python", "serving_env"))
    with server_of(python, env, work / "hf-modelopt", tmp_path / "server.log") as port:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        messages = [{"role": "user", "content": "1 + 2"}]
        answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=8, temperature=0)
    assert answer.usage.completion_tokens > 0  # the tokens of an untrained model mean nothing


@pytest.mark.timeout(1800)
@pytest.mark.all
def test_ptq_that_is_good_enough_is_exported(command, inputs, tmp_path):
    output = start(command, inputs, tmp_path / "work", "--min-kl", "100").communicate()[0]
    assert "PTQ is within --min-kl 100 of the teacher: nothing is trained" in output
    assert stages_in(output, " (log:") == [stage for stage in STAGES if stage not in ("qad", "select")]
    assert output.endswith(f"vllm serve {tmp_path}/work/hf-modelopt\n")


@pytest.mark.timeout(3600)
@pytest.mark.all
def test_a_run_that_is_killed_in_every_stage_ends_like_another(command, inputs, tmp_path):
    """Each stage is killed once in the middle of its work; then the run continues at once."""
    work = tmp_path / "work"
    for i, stage in enumerate(STAGES):
        with open(tmp_path / "output.txt", "w") as file, start(command, inputs, work, output=file) as process:
            wait_until_it_works(process, work, stage)
            process.kill()
        output = (tmp_path / "output.txt").read_text()
        # The stage that was killed before runs again, from its beginning or from its checkpoint.
        assert stages_in(output, " (log:") == STAGES[max(0, i - 1) : i + 1], output[-4000:]
        assert stages_in(output, ": done before") == STAGES[: max(0, i - 1)]
        assert not (work / "log" / f"{stage}.done").exists(), f"{stage} had ended before it was killed"
    output = start(command, inputs, work).communicate()[0]
    check(work, output)
    assert (work / "log" / "qad.txt").read_text().count(" | iteration 4/4 |") == 1


def wait_until_it_works(process: subprocess.Popen, work: Path, stage: str) -> None:
    """Wait until a stage has written its first file, or has said what ``SAYS`` has; without either, for a second."""
    log = work / "log" / f"{stage}.txt"
    begin = None
    while process.poll() is None:
        if log.exists():
            begin = begin or time.monotonic()
            if stage in WRITES and any(work.glob(WRITES[stage])):
                return
            if stage in SAYS and SAYS[stage] in log.read_text(errors="replace"):
                return
            if stage not in SAYS | WRITES and time.monotonic() > begin + 1:
                return
        time.sleep(0.005)
    raise AssertionError(f"the run ended before {stage} was seen at work")
