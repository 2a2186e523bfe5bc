"""``vllm serve`` over HTTP: an export's tokenizer, chat template and generation config are what the server uses."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import students
from agreement import Agreement
from launch import ROOT
from vllm_server import NAME, server_of

from megatron_qad.data.generate import GenerateOptions, write_documents
from megatron_qad.data.prepare import PrepareOptions, prepare_data
from megatron_qad.data.server_generation import ServerModel
from megatron_qad.data.tokenizer import load_tokenizer
from megatron_qad.engine import QADError
from megatron_qad.evaluation import benchmark_results

QUESTION = "What is a class?"
SUMS = """\
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: problems.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [], max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def port(serving_python, serving_env, text_student, tmp_path_factory) -> Iterator[int]:
    """Port of a server of the trained student."""
    log = tmp_path_factory.mktemp("http") / "server.log"
    with server_of(serving_python, serving_env, text_student.export("modelopt"), log) as port:
        yield port


@pytest.fixture(scope="module")
def answers(port, serving_python, serving_env, text_student, tmp_path_factory) -> dict:
    """What the server answered to vllm_client.py."""
    directory = tmp_path_factory.mktemp("client")
    tokens, output = directory / "tokens.json", directory / "answers.json"
    tokens.write_text(json.dumps(text_student.prompts[0].tolist()))
    client = [serving_python, Path(__file__).with_name("vllm_client.py"), port, NAME, QUESTION, tokens, output]
    done = subprocess.run(list(map(str, client)), env=serving_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text())


def test_prompt_logprobs_are_the_students(answers, text_student, record_property):
    vocab_size = text_student.logprobs.shape[-1]
    first, *entries = answers["prompt_logprobs"]
    assert first is None  # nothing precedes the first token
    served = np.array([[position[str(token)] for token in range(vocab_size)] for position in entries])
    agreement = Agreement.of(text_student.logprobs[0, :-1], served)
    record_property("served", agreement.row("text", "modelopt", "vllm serve, HTTP"))
    assert agreement.kl <= 1e-3 and agreement.top1 >= 0.97  # as in test_vllm_trained; measured 1.8e-10, 1.0


def test_chat_uses_template_and_generation_config(answers, text_student):
    """The template makes the prompt; the generation config limits the answer and chooses the most likely token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(text_student.export("modelopt"))
    messages = [{"role": "user", "content": QUESTION}]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    prompt, answer = answers["prompt_tokens"], answers["answer_tokens"]
    assert answers["models"] == [NAME]
    assert prompt == asked and f"<user>: {QUESTION}" in tokenizer.decode(prompt)
    assert 0 < len(answer) <= students.MAX_NEW_TOKENS
    assert answers["finish_reason"] == ("length" if len(answer) == students.MAX_NEW_TOKENS else "stop")
    assert answers["answer"] == tokenizer.decode(answer, skip_special_tokens=True)
    tokens = np.array([[*prompt, *answer]])
    tokens = np.pad(tokens, ((0, 0), (0, tokens.shape[1] % 2)))  # two ranks split the sequence
    logprobs = text_student.logprobs_of(tokens)[0, len(prompt) - 1 : len(prompt) + len(answer) - 1]
    chosen = logprobs[np.arange(len(answer)), answer]
    # An input next to a rounding boundary may change log-probabilities by 0.6. Sampled ones are 2.8 below on average.
    assert (chosen >= logprobs.max(-1) - 1).all(), "an answer's token is not the student's most likely one"


def test_data_are_generated_by_the_server(port, text_student, tmp_path):
    """A killed tools/generate_data.py is resumed without a gap or a duplicate, and the chats can be prepared."""
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {i}?", "answer": i}) + "\n" for i in range(24)))
    url = f"http://127.0.0.1:{port}/v1"
    command = [
        sys.executable,
        ROOT / "tools/generate_data.py",
        "--server",
        url,
        "--prompts",
        prompts,
        "--output",
        output,
    ]
    command = [*map(str, command), "--max-new-tokens", "8", "--batch-size", "4", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (output.is_file() and output.read_bytes().count(b"\n") >= 3):
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = output.read_bytes()
    assert 3 <= before.count(b"\n") < 24, "the tool was not killed while it wrote"
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert output.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["answer"] for line in lines] == list(range(24))
    assert all(line["messages"][0]["content"] == f"What is {i}?" for i, line in enumerate(lines))
    assert all(line["messages"][1]["role"] == "assistant" for line in lines)
    assert {line["finish"] for line in lines} <= {"eos", "length"}
    assert len({line["messages"][1]["content"] for line in lines}) > 1
    settings = json.loads((tmp_path / "answers.jsonl.settings.json").read_text())
    assert settings["model"] == NAME and "model.safetensors" in settings["model files"]  # the server's files are here
    prepare_data(PrepareOptions([str(output)], str(text_student.export("modelopt")), str(tmp_path / "data")))


def test_documents_from_bos_by_the_server(port, text_student, tmp_path):
    tokenizer = load_tokenizer(text_student.export("modelopt"))
    url = f"http://127.0.0.1:{port}/v1"
    options = GenerateOptions(num_documents=5, max_new_tokens=16, batch_size=4)
    start = tokenizer.eod if tokenizer.bos is None else tokenizer.bos
    write_documents(ServerModel(url, None, options, bos=start), tmp_path / "own.jsonl", 5)
    lines = [json.loads(line) for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    assert len(lines) == 5 and all(line["finish"] in ("eos", "length") for line in lines)
    assert all(len(tokenizer.encode(line["text"])) > 4 for line in lines if line["finish"] == "length")
    with pytest.raises(QADError, match=f"serves {NAME}, not 'other'"):
        ServerModel(url, ["a"], options, "other")
    with pytest.raises(QADError, match="does not list its models: NotFoundError"):
        ServerModel(url[:-3], ["a"], options)
    long = GenerateOptions(num_documents=1, max_new_tokens=10**6)
    with pytest.raises(QADError, match="BadRequestError.*Start the command again"):
        write_documents(ServerModel(url, ["a"], long), tmp_path / "long.jsonl", 1)


def test_benchmark_by_the_server(port, tmp_path):
    """Two sampled runs of each problem through lm-evaluation-harness; a second call makes the third run only."""
    problems = [{"question": f"{i} + {i} =", "answer": str(2 * i)} for i in range(4)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    (tmp_path / "sums.yaml").write_text(SUMS)
    url = f"http://127.0.0.1:{port}/v1"
    flags = ["--server", url, "--tasks", str(tmp_path / "sums.yaml"), "--output", str(tmp_path / "results")]
    for runs, made in (("2", "made 2 of 2 runs"), ("3", "made 1 of 3 runs")):
        command = [sys.executable, str(ROOT / "tools/benchmark.py"), *flags, "--runs", runs, "--chat"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and made in done.stdout, done.stderr[-3000:]
    results = benchmark_results.load(tmp_path / "results")
    (scores,) = (task.scores[task.metric] for task in results.tasks.values())
    assert scores.shape == (4, 3) and np.isfinite(scores).all()  # problems, runs
