"""Opens the file for other packages' output when a job begins, and prints what the job will do."""

from collections import Counter
from collections.abc import Iterator

import torch
from megatron.training import print_rank_0

from megatron_qad.engine.events import Callback
from megatron_qad.engine.plural import count
from megatron_qad.training.plan import model_lines, parallelism_lines


class RunHeader(Callback):
    """Prints a few lines about a job before it loads its models."""

    def __init__(self, job):
        self._job = job

    def job_begins(self, job, resumes_at: int) -> None:
        self._job.output.open()  # the first rank has locked the directory before the process groups existed
        for line in self._lines(resumes_at):
            print_rank_0(f"megatron_qad: {line}")

    def job_ends(self, is_done: bool) -> None:
        if not is_done:  # Megatron's own message is in the file
            done, of = self._job.loop.iteration, self._job.args.train_iters
            print_rank_0(
                f"megatron_qad: the job stops after iteration {done} of {of}; started again, it continues there"
            )

    def closes(self) -> None:
        self._job.output.close()

    def _lines(self, resumes_at: int) -> Iterator[str]:
        config, args = self._job.config, self._job.args
        options = config.options
        yield from model_lines(config, args)
        if not options.qad_ptq:
            yield f"loss        {options.qad_loss}, temperature {options.qad_temperature:g}"
        counts = Counter(config.formats.values()).items()
        formats = ", ".join(f"{count(number, 'linear')} in {fmt}" for fmt, number in counts)
        yield f"policy      {options.qad_policy}: {formats}; KV cache in {config.policy.kv_cache}"
        yield from parallelism_lines(config, args)
        yield f"checkpoints {self._saving()}"
        if resumes_at:
            yield f"resuming    from iteration {resumes_at} of {args.load}"
        yield f"messages    of Megatron and other packages {self._messages()}"

    def _saving(self) -> str:
        args, options = self._job.args, self._job.config.options
        if args.save is None:
            return "none are saved: no --save"
        interval = "at the end"
        if args.save_interval and not options.qad_ptq:
            interval = f"every {count(args.save_interval, 'iteration')} and {interval}"
        kinds = {"last": options.qad_keep_last, "best": options.qad_keep_best}
        kept = " and ".join(f"the {kind} {number}" for kind, number in kinds.items() if number) or "all"
        return f"in {args.save}, {interval}; {kept} are kept"

    def _messages(self) -> str:
        output, options = self._job.output, self._job.config.options
        shown = "are shown here, too (--qad-verbose)" if options.qad_verbose else ""
        if output.path is None:
            return shown or "are dropped: no --save (--qad-verbose shows them)"
        last = torch.distributed.get_world_size() - 1
        files = f"are in {output.path}" + (f" and megatron.rank{last}.log" if last else "")
        return f"{files}{', and ' + shown if shown else ''}"
