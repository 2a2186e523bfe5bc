"""Runs benchmarks on a model through lm-evaluation-harness: local task files, several sampled runs of each problem.

    megatron-qad benchmark --model HF --tasks aime25.yaml gpqa.yaml --preset nano-9b-v2 --output RESULTS
    megatron-qad benchmark --server http://HOST:8000/v1 --chat --tasks aime25.yaml --runs 16 --output RESULTS

After a kill, the same command continues after the finished runs. megatron-qad compare-benchmarks compares the
results of several models (docs/benchmarking.md).
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_qad.cli.command_parser import command_parser
from megatron_qad.engine import init_runtime
from megatron_qad.engine.errors import QADError


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmark", __doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="Hugging Face directory that transformers can load")
    source.add_argument("--server", help="address of an OpenAI-compatible server, up to /v1")
    parser.add_argument("--tasks", nargs="+", type=Path, required=True, help="task files of lm-eval (YAML)")
    parser.add_argument("--output", type=Path, required=True, help="directory for the results")
    parser.add_argument("--preset", help="runs and sampling of the QAD report, by model")
    parser.add_argument("--runs", nargs="+", default=[], metavar="N|TASK=N", help="sampled runs of each problem (1)")
    parser.add_argument("--temperature", type=float, help="default: that of the preset, or 0.6")
    parser.add_argument("--top-p", type=float, help="default: that of the preset, or 0.95")
    parser.add_argument("--seed", type=int, default=1234, help="run r has the seed SEED + r")
    parser.add_argument("--max-new-tokens", type=int, help="maximum length of an answer; default: the task's")
    parser.add_argument("--chat", action="store_true", help="ask through the chat template")
    parser.add_argument("--unsafe-code", action="store_true", help="allow tasks that execute what the model wrote")
    group = parser.add_argument_group("with --model")
    group.add_argument("--batch-size", type=int, default=8)
    group.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    group.add_argument("--device", default="cpu", help="torch device, such as cuda")
    group = parser.add_argument_group("with --server")
    group.add_argument("--served-model", help="name of the model, if the server has several")
    group.add_argument("--tokenizer", type=Path, help="tokenizer, for tasks that compare log-probabilities")
    group.add_argument("--server-fields", type=json.loads, help="JSON of more request fields (top_k, min_p, ... off)")
    group.add_argument("--num-concurrent", type=int, default=8, help="requests at a time")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    init_runtime()

    from megatron_qad.data.openai_server import SERVER_FIELDS
    from megatron_qad.evaluation import benchmark_models as models
    from megatron_qad.evaluation.benchmark_presets import find_preset
    from megatron_qad.evaluation.benchmark_runs import Sampling, check_runs, run_benchmarks
    from megatron_qad.evaluation.benchmark_tasks import read_task

    preset = None if options.preset is None else find_preset(options.preset)
    given = {name: getattr(options, name) for name in ("temperature", "top_p")}
    given = {name: value for name, value in given.items() if value is not None}
    if preset is not None:
        given = {"temperature": preset.temperature, "top_p": preset.top_p} | given
    sampling = Sampling(**given, max_new_tokens=options.max_new_tokens, seed=options.seed)
    tasks = [read_task(file) for file in options.tasks]
    runs = check_runs(tasks, _runs(options.runs, tasks, preset), sampling)
    if options.model is not None:
        more = {"batch_size": options.batch_size, "dtype": options.dtype, "device": options.device}
        model = models.open_directory(options.model, chat=options.chat, **more)
    else:
        model = models.open_server(
            options.server,
            options.served_model,
            chat=options.chat,
            tokenizer=options.tokenizer,
            fields=SERVER_FIELDS if options.server_fields is None else options.server_fields,
            num_concurrent=options.num_concurrent,
        )
    done = run_benchmarks(model, tasks, runs, sampling, options.output, options.unsafe_code)
    print(f"made {done} of {sum(runs.values())} runs; the others were there. Results: {options.output}")


def _runs(texts: list[str], tasks, preset) -> dict[str, int]:
    """Return the number of runs of each task. --runs takes precedence over the preset."""
    from megatron_qad.evaluation.benchmark_presets import preset_runs

    by_name, general = {}, None
    for text in texts:
        name, separator, number = text.rpartition("=")
        if not number.isdigit() or (separator and name not in {task.name for task in tasks}):
            raise QADError(
                f"--runs {text}: expected N, or TASK=N where TASK is one of {', '.join(t.name for t in tasks)}."
            )
        if separator:
            by_name[name] = int(number)
        else:
            general = int(number)

    def of(task) -> int:
        if task.name in by_name:
            return by_name[task.name]
        if general is not None or preset is None or not task.is_sampled:
            return general or 1
        return preset_runs(preset, task.name)

    return {task.name: of(task) for task in tasks}
