"""Functions that the ranks of test_training run: pretrain_qad.py's ``main`` with a callback that records each step.

The callback copies gradients, parameters and masters of this rank before and after each update, with the global names
of the tensors and the axes along which they are sharded.
"""

import importlib
import os
import sys
from collections import Counter
from collections.abc import Sequence

import torch

from megatron_qad.engine.events import Callback


def import_checkpoints(models: list[tuple[str, str, str]]) -> None:
    """Run the import of tools/import_hf.py for several models: (source, target, dtype) of each."""
    from megatron_qad.checkpoint.import_hf import import_hf
    from megatron_qad.engine.distributed import init_process_group

    init_process_group()
    for source, target, dtype in models:
        import_hf(source, target, getattr(torch, dtype))


def export_checkpoint(checkpoint: str, outputs: dict[str, str], iteration: int | str | None = None) -> None:
    """Run the export of tools/export_hf.py for several export layouts: layout -> directory."""
    from megatron_qad.checkpoint.export_hf import export_hf
    from megatron_qad.engine import QADError
    from megatron_qad.engine.distributed import init_process_group

    init_process_group()
    try:
        for layout, output in outputs.items():
            export_hf(checkpoint, output, layout, iteration=iteration)
    except QADError as error:
        sys.exit(f"error: {error}")


def train(
    argv: list[str],
    record: str | None = None,
    follow: str | None = None,
    weights_only: bool = False,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Run ``pretrain_qad.py *argv``; errors are printed as the script prints them.

    Args:
        record: each rank writes its list of steps (see ``_Watch``) to ``{record}.rank{r}``.
        follow: record of a one-rank float32 job; each step starts from that job's parameters at this step.
        weights_only: turn the input quantizers off after the first step, which calibrates them.
        callbacks: additional callbacks, which run after ``_Watch``.
    """
    import pretrain_qad
    from megatron_qad.engine import QADError

    watch = _Watch(follow, weights_only) if record else None
    try:
        pretrain_qad.main(argv, [*([watch] if watch else []), *callbacks])
    except QADError as error:
        sys.exit(f"error: {error}")
    finally:  # --exit-interval leaves by SystemExit
        if watch:
            torch.save(watch.steps, f"{record}.rank{os.environ['RANK']}")


def compare_loop(argv: list[str], result: str) -> None:
    """Train; write the names of functions that are replaced in the module of Megatron's loop, during training and
    afterwards."""
    from megatron.training import training as megatron_loop

    before = dict(vars(megatron_loop))

    def changed() -> list[str]:
        after = vars(megatron_loop)
        names = sorted(n for n in before.keys() | after.keys() if after.get(n) is not before.get(n))
        return [name for name in names if callable(after.get(name))]  # other names are the module's own state

    class Compare(Callback):
        def step_begins(self, step, model):
            torch.save(changed(), f"{result}.meanwhile")

    train(argv, callbacks=[Compare()])
    torch.save(changed(), f"{result}.afterwards")


_INSIDE = ("megatron_qad/engine/cpu/", "megatron_qad/formats/", "megatron_qad/quantization/", "megatron_qad/models/")
"""Code that runs inside of a model's layers or replaces a GPU. The output layer, in models/, is not part of it."""


def files_of_a_microbatch(argv: list[str], result: str, num_microbatches: int) -> None:
    """Train; write the names of our files with a function that is called once per microbatch (or a multiple of that)
    from the beginning of the second step to its gradients."""
    calls: Counter = Counter()
    root = f"{os.getcwd()}/"

    def count(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(root):
            calls[frame.f_code.co_filename.removeprefix(root), frame.f_code.co_qualname] += 1

    class Profile(Callback):
        def step_begins(self, step, model):
            if step == 2:
                sys.setprofile(count)

        def gradients_begin(self):
            sys.setprofile(None)

    train(argv, callbacks=[Profile()])
    files = {file for (file, _), num_calls in calls.items() if num_calls % num_microbatches == 0}
    files = {f for f in files if f == "megatron_qad/models/output_layer.py" or not f.startswith((*_INSIDE, "tests/"))}
    torch.save(sorted(f for f in files if not f.startswith(".venv")), result)


class _Watch(Callback):
    """Records each step: loss (sum, count) on the last stage, grad_norm, and shards by global parameter name.

    A shard is (tensor, axis along which it is tensor-parallel or None, this rank's rows of each stacked part that is
    sharded separately, tensor-parallel rank). "batches" are the microbatches of the student, "amaxes" those of its
    input quantizers.
    """

    def __init__(self, follow: str | None, weights_only: bool):
        self.steps: list[dict] = []
        self._followed = torch.load(f"{follow}.rank0") if follow else None
        self._weights_only = weights_only

    def job_begins(self, job, resumes_at):
        self._job = job

    def step_begins(self, step, model):
        if self.steps and self._followed:
            _set_parameters(model, self._followed[len(self.steps) - 1]["params"], self._shards)
        if self.steps and self._weights_only:
            for module in (module for chunk in model for module in chunk.modules()):
                if hasattr(module, "input_quantizer"):
                    module.input_quantizer.disable()
        self.steps.append({"batches": []})
        self._model = model

    def student_begins(self, batches, is_training):
        if is_training:
            self.steps[-1]["quantized"] = self._shards(self._model, lambda p: p.data)
            self.steps[-1]["batches"] += [
                vars(batch) | {"teacher_output": None, "documents": None, "images": None} for batch in batches
            ]

    def before_update(self, update):
        # None for frozen parameters
        self.steps[-1]["grads"] = self._shards(update.model, lambda p: getattr(p, "main_grad", None))

    def step_ended(self, step):
        record = self.steps[-1]
        record["loss"] = {name: torch.as_tensor(value).tolist() for name, value in step.losses.items()}
        record["grad_norm"] = None if step.grad_norm is None else float(step.grad_norm)  # None if skipped
        record["params"] = self._shards(step.model, lambda p: p.data)
        record["masters"] = self._shards(step.model, _master)
        record["amaxes"] = _amaxes(step.model)
        record["num_quantizations"] = self._job.weights.num_quantizations

    @staticmethod
    def _shards(model, get_value, copy: bool = True) -> dict:
        from megatron.core import mpu
        from megatron.training import get_args

        from megatron_qad.quantization.names import is_expert, linear_weights, named_modules_globally

        args = get_args()
        is_tied = not args.untie_embeddings_and_output_weights

        shards = {}
        for chunk in model:
            for name, module in named_modules_globally(chunk):
                if is_tied and name == "output_layer":  # the copy of the embedding on the last stage
                    name = "embedding.word_embeddings"
                for kind, parameter in module.named_parameters(recurse=False):
                    if (value := get_value(parameter)) is None:
                        continue
                    is_sharded = getattr(parameter, "tensor_model_parallel", False)
                    axis = parameter.partition_dim if is_sharded else None
                    value = value.clone() if copy else value
                    if is_expert(name):
                        rank = mpu.get_expert_tensor_parallel_rank()
                        for expert_name, weight in linear_weights(name, module).items():
                            parts = _part_rows(name, weight.part_of(parameter), args.swiglu)
                            shards[expert_name] = (weight.part_of(value), axis - 1, parts, rank)
                        continue
                    kind = kind.replace("conv1d_", "conv1d.")  # the name in a checkpoint
                    rank = mpu.get_tensor_model_parallel_rank()
                    shards[f"{name}.{kind}"] = (value, axis, _part_rows(name, parameter, args.swiglu), rank)
        return shards


def _part_rows(name: str, parameter, is_gated: bool) -> list[int] | None:
    """Return the rows of each part that is sharded separately, or None if there is one part."""
    if is_gated and name.endswith("linear_fc1"):
        return [len(parameter) // 2] * 2
    return getattr(parameter, "partition_sizes", None)  # set by Mamba layers


def _set_parameters(model, whole: dict, shards) -> None:
    """Set this rank's shards to the parameters of a one-rank job, except vocabulary padding, whose length differs."""
    from megatron.core import mpu

    for name, (parameter, axis, parts, rank) in shards(model, lambda p: p.data, copy=False).items():
        value = whole[name][0]
        if axis is not None:
            size = mpu.get_tensor_model_parallel_world_size()
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                value = value[rank * len(parameter) : (rank + 1) * len(parameter)]
            else:
                whole_parts = value.split([rows * size for rows in parts] if parts else value.shape[axis], dim=axis)
                value = torch.cat([part.chunk(size, dim=axis)[rank] for part in whole_parts], dim=axis)
        parameter[: len(value)].copy_(value)


def _amaxes(model) -> dict[str, torch.Tensor]:
    from megatron_qad.quantization.names import named_modules_globally

    return {
        name.removesuffix(".input_quantizer"): module._amax.clone()
        for chunk in model
        for name, module in named_modules_globally(chunk)
        if name.endswith("_quantizer") and getattr(module, "_amax", None) is not None
    }


def _master(parameter):
    """Return the float32 master of a BF16 parameter in its shape, or None if data-parallel ranks hold shards of it."""
    master = getattr(parameter, "main_param", None)
    return None if master is None or master.numel() != parameter.numel() else master.view(parameter.shape)


def tool(name: str, argv: list[str]) -> None:
    """Run tools/``name``.py; errors are printed as the script prints them."""
    sys.path.insert(0, "tools")
    from megatron_qad.engine import QADError

    sys.argv = [f"{name}.py"]
    try:
        importlib.import_module(name).main(argv)
    except QADError as error:
        sys.exit(f"error: {error}")
