"""Benchmarks of a tiny transformers model through lm-evaluation-harness, from task files that the test writes."""

import json
import shutil

import pytest
import tokenizers
import torch
import transformers

pytest.importorskip("lm_eval", reason="the extra `benchmarks` is not installed")

from megatron_qad.engine.errors import QADError  # noqa: E402
from megatron_qad.evaluation import benchmark_results  # noqa: E402
from megatron_qad.evaluation.benchmark_models import open_directory  # noqa: E402
from megatron_qad.evaluation.benchmark_runs import Sampling, check_runs, run_benchmarks  # noqa: E402
from megatron_qad.evaluation.benchmark_tasks import read_task  # noqa: E402

DATA = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "problems.jsonl"}}, "test_split": "test"}
WRITTEN = {
    "task": "written",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
}
WRITTEN |= {"generation_kwargs": {"until": ["z"], "max_gen_toks": 3}, "filter_list": [{"name": "first", "filter": []}]}
WRITTEN["filter_list"][0]["filter"] = [{"function": "regex", "regex_pattern": "(.)"}, {"function": "take_first"}]
WRITTEN["metric_list"] = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
CHOSEN = {
    "task": "chosen",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{label}}",
}
CHOSEN |= {"doc_to_choice": ["a", "bc"], "target_delimiter": ""}
SAMPLING = Sampling(temperature=1.0, top_p=1.0, seed=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *"abcdefgh", " "])}
    words = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    words.decoder = tokenizers.decoders.Fuse()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(
        directory
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"vocab_size": len(vocab), "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 64}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **ends)).save_pretrained(directory)
    return open_directory(directory, chat=False, batch_size=4, dtype="float32", device="cpu")


@pytest.fixture
def write_task(tmp_path):
    """``write_task(name, config)``: write a task file and its data in a folder."""

    def write(config: dict, **changes):
        lines = [
            {"question": q, "answer": q[0], "label": i % 2} for i, q in enumerate(["ab", "cd", "ef", "gh", "ba", "dc"])
        ]
        (tmp_path / "problems.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        file = tmp_path / f"{config['task']}.yaml"
        file.write_text(json.dumps(DATA | config | changes))  # JSON is YAML
        return file

    return write


def contents(directory):
    return {file.name: file.read_bytes() for file in directory.glob("*.jsonl")}


def test_runs_are_stored_and_resumed_with_the_same_scores(model, write_task, tmp_path):
    tasks = [read_task(write_task(WRITTEN)), read_task(write_task(CHOSEN))]
    runs = check_runs(tasks, {"written": 3, "chosen": 3}, SAMPLING)
    assert runs == {"written": 3, "chosen": 1}
    output = tmp_path / "results"
    assert run_benchmarks(model, tasks, runs, SAMPLING, output) == 4
    through = contents(output)
    assert len(through) == 4 and len({through[f"written.run00{run}.jsonl"] for run in range(3)}) == 3

    (output / "written.run001.jsonl").unlink()  # as if killed before the rename
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert run_benchmarks(model, tasks, runs, SAMPLING, output) == 1
    assert contents(output) == through

    results = benchmark_results.load(output)
    assert results.settings["tasks"]["written"]["files"].keys() == {"written.yaml", "problems.jsonl"}
    scores = results.tasks["written"].scores
    assert list(scores) == ["exact_match,first"] and scores["exact_match,first"].shape == (6, 3)
    lines = [json.loads(line) for line in through["written.run000.jsonl"].decode().splitlines()]
    assert [line["seed"] for line in lines] == [3] * 6
    for line, problem in zip(lines, ["ab", "cd", "ef", "gh", "ba", "dc"], strict=True):
        assert line["scores"]["exact_match,first"] == float(line["answers"]["first"] == [problem[0]])
    assert results.tasks["chosen"].scores["acc,none"].shape == (6, 1)

    with pytest.raises(QADError, match="was started with another sampling"):
        run_benchmarks(model, tasks, runs, Sampling(temperature=0.5, seed=3), output)
    write_task(WRITTEN, doc_to_text="{{answer}}")
    with pytest.raises(QADError, match="the files of task written have changed"):
        run_benchmarks(model, [read_task(tmp_path / "written.yaml")], {"written": 3}, SAMPLING, output)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dataset_path": "openai/gsm8k"},
            "task written .*'openai/gsm8k' is not on this machine and would be downloaded",
        ),
        ({"dataset_kwargs": {"data_files": {"test": "no.jsonl"}}}, "the data file no.jsonl does not exist"),
        ({"dataset_path": None}, "no dataset_path"),
        (
            {"metric_list": [{"metric": "bertscore"}]},
            "the metric 'bertscore' is not in lm-eval and would be downloaded",
        ),
        ({"repeats": 4}, "Remove it and give --runs"),
        ({"task": ["a", "b"]}, "Groups of tasks are not read"),
    ],
)
def test_downloads_and_groups_are_refused_before_anything_starts(write_task, changes, message):
    file = write_task(WRITTEN)
    file.write_text(json.dumps(DATA | WRITTEN | changes))
    with pytest.raises(QADError, match=message):
        read_task(file)


def test_runs_that_would_be_equal_are_refused(write_task):
    task = read_task(write_task(WRITTEN))
    with pytest.raises(QADError, match="temperature 0 gives equal runs"):
        check_runs([task], {"written": 2}, Sampling(temperature=0))
    endless = read_task(write_task(WRITTEN, generation_kwargs={}))
    with pytest.raises(QADError, match="Give --max-new-tokens"):
        check_runs([endless], {"written": 1}, SAMPLING)
