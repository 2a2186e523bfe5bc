"""Measure the time per training step of quantizing weights in place, compared with quantizing in every forward pass.

    python tools/bench_in_place.py [--nproc 2] [--repeat 2] --config examples/smollm2_135m/train.yaml \
      --qad-teacher CKPT --data-path DATA --train-iters 6 ...        (pretrain_qad.py's flags; tensor parallelism 1)

Both variants are complete QAD jobs with the same arithmetic, run alternately. They differ only in where weights are
quantized. The table shows medians of Megatron's step times, without the first two steps.
"""

import argparse
import re
import statistics
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

VARIANTS = ("in-place", "every-forward")
SCALES = ("--qad-weight-scale-rule", "max")  # of every step: the other variant computes them in every forward pass
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--nproc", type=int, default=1, help="number of ranks")
    parser.add_argument("--repeat", type=int, default=2, help="number of runs per variant; the variants alternate")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)  # makes this process a rank of that job
    options, job_args = parser.parse_known_args()
    if options.variant:
        return run_job(options.variant, job_args)
    steps: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    quantizing, passes = [], ""
    for _ in range(options.repeat):
        for variant in VARIANTS:
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(options.nproc),
            ]
            done = subprocess.run(
                [*command, __file__, "--variant", variant, *SCALES, *job_args, "--qad-verbose"],
                capture_output=True,
                text=True,
                cwd=ROOT,
            )
            if done.returncode:
                sys.exit(f"error: the job failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
            times = [float(ms) / 1e3 for ms in re.findall(r"elapsed time per iteration \(ms\): ([0-9.]+)", done.stdout)]
            steps[variant] += times[2:]
            quantizing += [float(s) for s in re.findall(r"quantized in place in ([0-9.]+) s a step", done.stdout)]
            passes = next(iter(re.findall(r"\d+ weight quantizations a step in every-forward", done.stdout)), passes)
    medians = {variant: statistics.median(times) for variant, times in steps.items()}
    print("| weights quantized | seconds per step (median) | of which for weights |\n|---|---|---|")
    share = statistics.median(quantizing) / medians["in-place"]
    print(f"| in place, once a step | {medians['in-place']:.2f} | {statistics.median(quantizing):.3f} s, {share:.1%} |")
    difference = medians["every-forward"] - medians["in-place"] + statistics.median(quantizing)
    print(f"| in every forward pass | {medians['every-forward']:.2f} | {difference:.2f} s (by difference) |")
    print(f"{len(steps['in-place'])} steps each; {passes or 'no count'}")


def run_job(variant: str, argv: list[str]) -> None:
    """Run one rank of a job. Its last line of output is the time or the number of weight quantizations."""
    sys.path.insert(0, str(ROOT))
    import pretrain_qad  # noqa: I001  first, because it prepares the backend
    from megatron.training import print_rank_0

    from megatron_qad.engine.events import Callback

    class ReplaceWeights(Callback):
        """Replaces the job's weights in the variant that quantizes in every forward pass."""

        def job_begins(self, job, resumes_at):
            self.job = job

        def student_ready(self, student):
            if variant == "every-forward":
                in_place = self.job.weights
                self.job.weights = in_every_forward(type(in_place))(student, self.job.config.formats)

    replace_weights = ReplaceWeights()
    pretrain_qad.main(argv, [replace_weights])
    weights = replace_weights.job.weights
    if variant == "in-place":
        print_rank_0(f"quantized in place in {weights.seconds / weights.num_quantizations:.4f} s a step")
    else:
        num_quantizations = weights.num_in_forward // max(1, weights.num_schedules)
        print_rank_0(f"{num_quantizations} weight quantizations a step in every-forward")


def in_every_forward(in_place: type) -> type:
    """Return a subclass of ``InPlaceWeights`` that quantizes in every forward pass instead.

    It leaves parameters unchanged and lets modelopt's weight quantizers run with the same arithmetic.
    """
    from modelopt.torch.quantization.nn import register_quant_backend

    from megatron_qad.formats import nvfp4
    from megatron_qad.formats.nvfp4_format import NVFP4
    from megatron_qad.quantization.activations import FakeQuantSTE, input_attributes
    from megatron_qad.quantization.names import named_modules_globally

    class InEveryForward(in_place):
        def __init__(self, chunks, formats, *args, **kwargs):
            super().__init__(chunks, formats, *args, **kwargs)
            assert all(linear.expert is None for linear in self.linears.values()), "not supported: experts"
            self.num_in_forward = self.num_schedules = 0
            self._is_counting = False  # calibration runs its forward passes outside quantized_weights
            register_quant_backend("bench_nvfp4_weights", self._quantize)
            for chunk in chunks:
                for name, module in named_modules_globally(chunk):
                    if f"{name}.weight" in self.weights:
                        module.weight_quantizer.set_from_attribute_config(
                            {**input_attributes(NVFP4), "backend": "bench_nvfp4_weights"}
                        )

        def _quantize(self, weight, quantizer):
            self.num_in_forward += self._is_counting
            scale = nvfp4.global_scale_from_amax(nvfp4.tensor_amax(weight))
            return FakeQuantSTE.apply(weight, scale, nvfp4.fake_quant)

        @contextmanager
        def quantized_weights(self, *, then_updated: bool):
            self.is_stale = True
            self.num_schedules += 1
            self._is_counting = True
            yield
            self._is_counting = False

    return InEveryForward


if __name__ == "__main__":
    main()
