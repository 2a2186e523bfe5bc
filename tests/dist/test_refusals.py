"""What a job refuses, its dry run refuses with the same line; neither ends in one of Megatron's errors."""

import json

import pytest
import tiny_job

# Flags that are added to those of a valid job, flags of it that are left out, and the start of the error.
REFUSED = {
    "no learning rate": ([], ["--lr"], "--lr is not set"),
    "no length": ([], ["--train-iters"], "--train-iters is not set"),
    "two lengths": (["--train-samples", "64"], [], "--train-iters 4 and --train-samples 64 both give the length"),
    "less than a step": (["--train-samples", "4"], ["--train-iters"], "--train-samples 4: is less than one step of 8"),
    "warmup as long as the training": (["--lr-warmup-iters", "4"], [], "--lr-warmup-iters 4: the warmup is as long"),
    "warmup longer than the decay": (
        ["--lr-warmup-iters", "2", "--lr-decay-iters", "2"],
        [],
        "--lr-warmup-iters 2: the warmup is as long as --lr-decay-iters 2",
    ),
    "two warmups": (["--lr-warmup-iters", "1", "--lr-warmup-fraction", "0.1"], [], "--lr-warmup-iters 1 and"),
    "warmup in another unit": (["--lr-warmup-samples", "8"], [], "--lr-warmup-samples 8: the training has its length"),
    "final rate above the first": (["--min-lr", "1"], [], "--min-lr 1: is above --lr 0.001"),
    "initial rate above the first": (["--lr-warmup-init", "1"], [], "--lr-warmup-init 1: is above --lr 0.001"),
    "WSD without its decay": (["--lr-decay-style", "WSD"], [], "--lr-wsd-decay-iters is not set"),
    "weight decay without its style": (["--start-weight-decay", "0"], [], "--start-weight-decay and --end-weight"),
    "weight decay without its end": (["--weight-decay-incr-style", "linear"], [], "--weight-decay-incr-style linear"),
    "two schedules": (
        ["--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler"],
        [],
        "--override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler contradict",
    ),
    "NaN": (["--lr", "nan"], [], "--lr nan: expected a finite number."),
    "infinity": (["--weight-decay", "inf"], [], "--weight-decay inf: expected a finite number."),
    "a flag of which QAD knows nothing": (["--moe-router-topk-scaling-factor", "nan"], [], "--moe-router-topk-scaling"),
    "negative": (["--clip-grad", "-1"], [], "--clip-grad -1.0: expected a number of 0 or more."),
    "negative warmup": (["--lr-warmup-iters", "-1"], [], "--lr-warmup-iters -1: expected a number of 0 or more."),
    "interval of 0": (["--log-interval", "0"], [], "--log-interval 0: expected a number of 1 or more."),
    "save interval of 0": (["--save-interval", "0"], [], "--save-interval 0: expected a number of 1 or more."),
    "eval interval of 0": (["--eval-interval", "0"], [], "--eval-interval 0: expected a number of 1 or more."),
    "beta of 1": (["--adam-beta2", "1"], [], "--adam-beta2 1.0: expected a number of 0 or more and below 1."),
    "seed of 0": (["--seed", "0"], [], "--seed 0: expected a number of 1 or more."),
    "no calibration": (["--qad-calibration-samples", "0"], [], "--qad-calibration-samples 0: expected a number of 1"),
    "endless calibration": (
        ["--qad-calibration-samples", "1000000000"],
        [],
        "--qad-calibration-samples 1000000000: expected a number of 1 or more and up to 65536.",
    ),
    "temperature of 0": (["--qad-temperature", "0"], [], "--qad-temperature 0.0: expected a number above 0."),
    "NaN timeout": (["--qad-hang-timeout", "nan"], [], "--qad-hang-timeout nan: expected a finite number."),
    "not a number": (["--lr", "abc"], [], "--lr: invalid float value: 'abc'. megatron-qad train --help-all describes"),
    "no value": (["--lr"], [], "--lr: expected one argument."),
    "not a choice": (["--qad-on-nan", "sotp"], [], "--qad-on-nan: invalid choice: 'sotp' (choose from"),
    "a typo": (["--trian-iters", "3"], [], "--trian-iters: no such flag; did you mean '--train-iters'?"),
    "a flag of version 0.1": (["--qad-hang-seconds", "3"], [], "--qad-hang-seconds: no such flag; its new name is"),
    "a flag of another program": (["--learning-rate", "1"], [], "--learning-rate: no such flag; did you mean '--lr'?"),
    "a flag of Megatron's past": (["--batch-size", "2"], [], "--batch-size: has no effect"),
    "a word too many": (["--bf16", "true"], [], "'true' after --bf16: is not a flag"),
    "another width": (["--hidden-size", "128"], [], "--hidden-size 128: contradicts the model in"),
    "other heads": (["--num-attention-heads", "8"], [], "--num-attention-heads 8: contradicts the model in"),
    "other layers": (["--num-layers", "12"], [], "--num-layers 12: contradicts the model in"),
    "another activation": (["--squared-relu"], [], "--squared-relu: contradicts the model in"),
    "experts": (["--num-experts", "4"], [], "--num-experts 4: contradicts the model in"),
    "another pattern": (["--hybrid-layer-pattern", "*-"], [], "--hybrid-layer-pattern *-: contradicts the model in"),
    "longer than the model": (["--seq-length", "128"], [], "--seq-length 128: is longer than the 64 positions of"),
    "data given twice": (["--train-data-path", "d"], [], "--data-path and --train-data-path both give the data."),
    "no data": ([], ["--data-path"], "No training data was given."),
    "missing data": (["--data-path", "nowhere"], [], "--data-path nowhere: nowhere.bin and nowhere.idx not found"),
    "no validation data": (["--split", "100,0,0"], [], "No validation data was given"),
    "Megatron's own assertion": (
        ["--recompute-granularity", "full"],
        [],
        "Megatron refuses the flags: Using recompute_granularity: full so recompute_method must be",
    ),
    "its assertion without a message": (
        ["--save", "{directory}/refused", "--save-interval", "2", "--save-retain-interval", "3"],
        [],
        "Megatron refuses the flags: the condition 'args.save_retain_interval % args.save_interval == 0' does not hold",
    ),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, server):
    directory = tmp_path_factory.mktemp("refusals")
    tiny_job.write_hf(directory / "hf", tiny_job.LLAMA | {"dtype": "bfloat16"})
    tiny_job.write_data(directory / "data", vocab_size=tiny_job.LLAMA["vocab_size"])
    models = [(f"{directory}/hf", f"{directory}/model", "bfloat16")]
    server.run("training_jobs:import_checkpoints", 1, {"models": models})
    return directory


def flags_of_a_job(directory, *left_out: str) -> list[str]:
    flags = {
        "--qad-teacher": f"{directory}/model",
        "--data-path": f"{directory}/data",
        "--data-cache-path": f"{directory}/cache",
        **{"--split": "80,20,0", "--seq-length": "32", "--micro-batch-size": "2", "--global-batch-size": "8"},
        **{"--train-iters": "4", "--lr": "1e-3", "--eval-iters": "1", "--qad-calibration-samples": "8"},
        "--num-workers": "0",
    }
    return [word for flag, value in flags.items() if flag not in left_out for word in (flag, value)]


def assert_refused(inputs, server, table: dict, *flags: str) -> None:
    """Check that each job of a table and its dry run end with the error of the table, in one line."""
    cases = [
        [*flags_of_a_job(inputs, *left_out), *(flag for flag in flags if flag not in left_out), *added]
        for added, left_out, _ in table.values()
    ]
    cases = [[word.replace("{directory}", str(inputs)) for word in argv] for argv in cases]
    server.run("refusal_jobs:outcomes", 1, {"cases": cases, "result": f"{inputs}/outcomes"}, timeout=240)
    outcomes = dict(zip(table, json.loads((inputs / "outcomes").read_text()), strict=True))
    wrong = {
        name: (dry_run, job)
        for name, (dry_run, job) in outcomes.items()
        if dry_run != job or not job.startswith(table[name][2]) or "\n" in job
    }
    assert not wrong


def test_dry_run_refuses_what_the_job_refuses(inputs, server):
    assert_refused(inputs, server, REFUSED)


# The same for a job that resumes from a checkpoint.
REFUSED_TO_RESUME = {
    "a longer training": (
        ["--train-iters", "8"],
        [],
        "--train-iters: the schedule of {} has 4 steps of 8",
    ),
    "another learning rate": (["--lr", "1e-4"], [], "--lr: the schedule of {} has 0.001, these flags give 0.0001. Add"),
    "another warmup": (["--lr-warmup-iters", "1"], [], "--lr-warmup-iters: the schedule of {} has 0 steps of 8"),
    "another weight decay": (["--weight-decay", "0"], [], "--weight-decay: the schedule of {} has 0.01, these flags"),
    "another style": (["--lr-decay-style", "cosine"], [], "--lr-decay-style: the schedule of {} has linear, these"),
    "another optimizer": (
        [],
        ["--use-distributed-optimizer"],
        "--use-distributed-optimizer: {} was saved with it, and",
    ),
    "other batches": (["--global-batch-size", "4"], [], "--train-iters: the schedule of {} has 8 steps of 4 samples"),
}


def test_checkpoint_must_fit_the_flags(inputs, server):
    save = ["--save", f"{inputs}/run", "--save-interval", "2", "--bf16", "--use-distributed-optimizer"]
    server.run("training_jobs:train", 1, {"argv": [*flags_of_a_job(inputs), *save, "--exit-interval", "2"]})
    table = {
        name: (added, left_out, error.format(f"{inputs}/run/iter_0000002"))
        for name, (added, left_out, error) in REFUSED_TO_RESUME.items()
    }
    assert_refused(inputs, server, table, *save)
    longer = [*flags_of_a_job(inputs), *save, "--train-iters", "3", "--override-opt-param-scheduler"]
    output = server.run("training_jobs:train", 1, {"argv": [*longer, "--log-interval", "1"]})
    assert "iteration 3/3 |" in output
