"""Worker that builds each model with Transformer Engine's layer spec and with the local one, and compares them.

Rank 0 reports the differences of all ranks in ``problems``, a list of messages that is empty if the specs agree.
"""

import dataclasses
from pathlib import Path

from launch import report

SPECS = ("local", "te")


def cases(arguments: dict) -> list[dict]:
    """Run all ``imports`` [source, target, dtype], then compare ``models`` {case, checkpoint, saved} at ``tp``."""
    from worker_job import job

    import torch  # isort: skip

    from megatron_qad.checkpoint.import_hf import import_hf
    from megatron_qad.engine.distributed import init_process_group

    init_process_group()
    for *paths, dtype in arguments["imports"]:
        import_hf(*paths, getattr(torch, dtype))
    results = []
    for model in arguments["models"]:
        views: dict[str, dict] = {}
        for spec in SPECS:
            saved = str(Path(model["saved"]) / spec)
            with job(model["checkpoint"], arguments["tp"], 1, *_flags(spec, saved)) as running_job:
                views[spec] = _build_load_save(running_job)
        for spec, other in (SPECS, SPECS[::-1]):
            saved = str(Path(model["saved"]) / spec)
            with job(model["checkpoint"], arguments["tp"], 1, *_flags(other, saved)) as running_job:
                views[f"{spec} in {other}"] = _load_checkpoint(running_job, saved)
        results.append({"case": model["case"], "problems": _gather_problems(_compare(views)), **_counts(views["te"])})
    return results


def _flags(spec: str, save: str) -> list[str]:
    implementation = "transformer_engine" if spec == "te" else "local"
    flags = ["--qad-layer-spec", spec, "--transformer-impl", implementation, "--save", save, "--save-interval", "1"]
    flags += ["--sequence-parallel"]  # required for experts; Megatron disables it at TP 1
    return [*flags, "--bf16", "--seq-length", "8", "--micro-batch-size", "1", "--qad-policy-override", "kv_cache=fp8"]


def _build_load_save(job) -> dict:
    """Build the model, load the import, insert quantizers with distinct amaxes, and save like the training loop."""
    import torch
    from megatron.training.checkpointing import save_checkpoint

    from megatron_qad.quantization.activations import ActivationQuantizers
    from megatron_qad.training.models import build_teacher
    from megatron_qad.training.run_description import describe_run

    chunks = build_teacher(job.config, job.args, job.forward).chunks
    plain = _checkpoint_view(chunks)
    activations = ActivationQuantizers(chunks, job.config.formats, kv_cache="fp8")
    activations.expect_amax(device=torch.cuda.current_device())
    for i, name in enumerate(sorted(activations.quantizers), start=1):
        activations.quantizers[name]._amax.fill_(i / 4)
    if job.args.rank == 0:
        Path(job.args.save).mkdir(parents=True, exist_ok=True)
        describe_run(job.config, Path(job.args.save))
    job.saves.install()
    save_checkpoint(3, chunks, None, None, 0)
    return {
        "plain": plain,
        "quantized": _checkpoint_view(chunks),
        "quantizers": sorted(activations.quantizers),
        "te_linears": _te_linears(chunks),
    }


def _te_linears(chunks) -> list[str]:
    """Return the names of Transformer Engine's linears, including modelopt's quantized subclasses."""
    from megatron_qad.quantization.names import named_modules_globally

    def is_te(module) -> bool:
        return any(base.__module__.startswith("transformer_engine.") for base in type(module).__mro__)

    modules = [item for chunk in chunks for item in named_modules_globally(chunk)]
    return sorted(name for name, m in modules if is_te(m) and getattr(getattr(m, "weight", None), "ndim", 0) == 2)


def _load_checkpoint(job, saved: str) -> dict:
    """Load the other spec's checkpoint ``saved``: the weights like a teacher, the amaxes like a resumed job."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.utils import unwrap_model

    from megatron_qad.engine.run_directory.iterations import iteration_dir
    from megatron_qad.quantization.activations import ActivationQuantizers
    from megatron_qad.training.models import build_teacher

    config = dataclasses.replace(job.config, teacher=dataclasses.replace(job.config.teacher, checkpoint=saved))
    chunks = build_teacher(config, job.args, job.forward).chunks
    activations = ActivationQuantizers(chunks, config.formats, kv_cache="fp8")
    activations.expect_amax(device=torch.cuda.current_device())
    (model,) = unwrap_model(chunks)
    amaxes = {k: v for k, v in model.sharded_state_dict().items() if k.endswith("_quantizer._amax")}
    loaded = dist_checkpointing.load(amaxes, str(iteration_dir(saved)))
    model.load_state_dict({name: loaded[name] for name in amaxes}, strict=False)
    return {"quantized": _checkpoint_view(chunks), "quantizers": sorted(activations.quantizers)}


def _checkpoint_view(chunks) -> dict:
    """Map checkpoint name and offset to (global shape, dtype, replica ID, local values), without ``_extra_state``."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories
    from megatron.core.utils import unwrap_model

    view = {}
    for chunk in unwrap_model(chunks):
        sharded = chunk.sharded_state_dict()
        apply_factories(sharded)
        for tensor in nested_values(sharded):
            if isinstance(tensor, ShardedTensor):  # _extra_state is an object
                key = f"{tensor.key} at {tensor.global_offset}"
                view[key] = (tuple(tensor.global_shape), tensor.dtype, tensor.replica_id, tensor.data.clone())
    return view


def _compare(views: dict[str, dict]) -> list[str]:
    problems = _view_differences("after import", views["local"]["plain"], views["te"]["plain"])
    for name in ("te", "local in te", "te in local"):
        problems += _view_differences(f"with quantizers, {name}", views["local"]["quantized"], views[name]["quantized"])
        if views[name]["quantizers"] != views["local"]["quantizers"]:
            problems.append(
                f"{name}: quantizers on {views[name]['quantizers']}, local has {views['local']['quantizers']}"
            )
    if views["local"]["te_linears"]:
        problems.append(f"the local spec has linears of Transformer Engine: {views['local']['te_linears'][:3]}")
    for name in views["te"]["quantizers"]:
        is_other = name.endswith(("k_bmm_quantizer", "v_bmm_quantizer")) or ".experts.experts.*." in name
        if name not in views["te"]["te_linears"] and name != "output_layer" and not is_other:
            problems.append(f"te: {name} is quantized but not a linear of Transformer Engine")
    return problems


def _view_differences(where: str, local: dict, te: dict) -> list[str]:
    import torch

    if set(local) != set(te):
        return [f"{where}: only local {sorted(set(local) - set(te))}, only te {sorted(set(te) - set(local))}"]
    problems = []
    for name, (*metadata, values) in local.items():
        *te_metadata, te_values = te[name]
        if metadata != te_metadata:
            problems.append(f"{where}: {name} is {metadata} with the local spec and {te_metadata} with te")
        elif not torch.equal(values, te_values):
            problems.append(f"{where}: {name} has different values")
    return problems


def _gather_problems(problems: list[str]) -> list[str]:
    import torch

    gathered = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, problems)
    return [f"rank {rank}: {problem}" for rank, rank_problems in enumerate(gathered) for problem in rank_problems]


def _counts(te: dict) -> dict:
    return {"linears": len(te["te_linears"]), "quantizers": len(te["quantizers"]), "tensors": len(te["plain"])}


if __name__ == "__main__":
    report(cases)
