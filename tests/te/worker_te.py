"""Worker: one model after the other, built from Transformer Engine's layers and from the local ones, side by side.

Rank 0 reports what all ranks found: ``problems`` is a list of sentences, empty where the two specs agree.
"""

import dataclasses
from pathlib import Path

from launch import report

SPECS = ("local", "te")


def cases(arguments: dict) -> list[dict]:
    """``imports`` [source, target, dtype] first; then each of ``models`` {case, checkpoint, saved} at ``tp``."""
    from worker_job import job

    import torch  # isort: skip

    from megatron_qad.checkpoint.import_hf import import_hf
    from megatron_qad.engine.distributed import init_process_group

    init_process_group()
    for *paths, dtype in arguments["imports"]:
        import_hf(*paths, getattr(torch, dtype))
    results = []
    for model in arguments["models"]:
        seen: dict[str, dict] = {}
        for spec in SPECS:
            saved = str(Path(model["saved"]) / spec)
            with job(model["checkpoint"], arguments["tp"], 1, *_flags(spec, saved)) as started:
                seen[spec] = _build_load_save(started)
        for spec, other in (SPECS, SPECS[::-1]):
            saved = str(Path(model["saved"]) / spec)
            with job(model["checkpoint"], arguments["tp"], 1, *_flags(other, saved)) as started:
                seen[f"{spec} in {other}"] = _load_job(started, saved)
        results.append({"case": model["case"], "problems": _all_ranks(_compare(seen)), **_counts(seen["te"])})
    return results


def _flags(spec: str, save: str) -> list[str]:
    implementation = "transformer_engine" if spec == "te" else "local"
    flags = ["--qad-layer-spec", spec, "--transformer-impl", implementation, "--save", save, "--save-interval", "1"]
    flags += ["--sequence-parallel"]  # experts want it; at TP 1 Megatron takes it out again
    return [*flags, "--bf16", "--seq-length", "8", "--micro-batch-size", "1", "--qad-policy-override", "kv_cache=fp8"]


def _build_load_save(job) -> dict:
    """Build, load the import, put the quantizers in, give each an amax of its own, save as the training loop does."""
    import torch
    from megatron.training.checkpointing import save_checkpoint

    from megatron_qad.quantization.activations import ActivationQuantizers
    from megatron_qad.training.models import build_teacher
    from megatron_qad.training.run_description import describe_run

    chunks = build_teacher(job.config, job.args, job.forward).chunks
    plain = _checkpoint_view(chunks)
    inputs = ActivationQuantizers(chunks, job.config.formats, kv_cache="fp8")
    inputs.expect_amax(device=torch.cuda.current_device())
    for number, name in enumerate(sorted(inputs.quantizers), start=1):
        inputs.quantizers[name]._amax.fill_(number / 4)
    if job.args.rank == 0:
        Path(job.args.save).mkdir(parents=True, exist_ok=True)
        describe_run(job.config, Path(job.args.save))
    job.saves.install()
    save_checkpoint(3, chunks, None, None, 0)
    return {
        "plain": plain,
        "quantized": _checkpoint_view(chunks),
        "quantizers": sorted(inputs.quantizers),
        "te_linears": _te_linears(chunks),
    }


def _te_linears(chunks) -> list[str]:
    """Names of the modules with a matrix that Transformer Engine multiplies; modelopt's quantized classes inherit."""
    from megatron_qad.quantization.names import named_modules_globally

    def is_te(module) -> bool:
        return any(base.__module__.startswith("transformer_engine.") for base in type(module).__mro__)

    modules = [pair for chunk in chunks for pair in named_modules_globally(chunk)]
    return sorted(name for name, m in modules if is_te(m) and getattr(getattr(m, "weight", None), "ndim", 0) == 2)


def _load_job(job, saved: str) -> dict:
    """What the other spec reads from ``saved``: weights as a teacher would, amaxes as a resumed job would."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.utils import unwrap_model

    from megatron_qad.engine.run_directory.iterations import iteration_dir
    from megatron_qad.quantization.activations import ActivationQuantizers
    from megatron_qad.training.models import build_teacher

    config = dataclasses.replace(job.config, teacher=dataclasses.replace(job.config.teacher, checkpoint=saved))
    chunks = build_teacher(config, job.args, job.forward).chunks
    inputs = ActivationQuantizers(chunks, config.formats, kv_cache="fp8")
    inputs.expect_amax(device=torch.cuda.current_device())
    (model,) = unwrap_model(chunks)
    amaxes = {k: v for k, v in model.sharded_state_dict().items() if k.endswith("_quantizer._amax")}
    loaded = dist_checkpointing.load(amaxes, str(iteration_dir(saved)))
    model.load_state_dict({name: loaded[name] for name in amaxes}, strict=False)
    return {"quantized": _checkpoint_view(chunks), "quantizers": sorted(inputs.quantizers)}


def _checkpoint_view(chunks) -> dict:
    """Name in a checkpoint -> (global shape, offset, dtype, this rank's values), without ``_extra_state``."""
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


def _compare(seen: dict[str, dict]) -> list[str]:
    problems = _views_differ("as built and imported", seen["local"]["plain"], seen["te"]["plain"])
    for name in ("te", "local in te", "te in local"):
        problems += _views_differ(f"with quantizers, {name}", seen["local"]["quantized"], seen[name]["quantized"])
        if seen[name]["quantizers"] != seen["local"]["quantizers"]:
            problems.append(
                f"{name}: quantizers on {seen[name]['quantizers']}, local has {seen['local']['quantizers']}"
            )
    if seen["local"]["te_linears"]:
        problems.append(f"the local spec holds {seen['local']['te_linears'][:3]}")
    for name in seen["te"]["quantizers"]:
        is_kv = name.endswith(("k_bmm_quantizer", "v_bmm_quantizer"))
        if name not in seen["te"]["te_linears"] and name != "output_layer" and not is_kv:
            problems.append(f"te: {name} is quantized and no linear of Transformer Engine")
    return problems


def _views_differ(where: str, local: dict, te: dict) -> list[str]:
    import torch

    if set(local) != set(te):
        return [f"{where}: only local {sorted(set(local) - set(te))}, only te {sorted(set(te) - set(local))}"]
    problems = []
    for name, (*described, values) in local.items():
        *other, te_values = te[name]
        if described != other:
            problems.append(f"{where}: {name} is {described} in the local spec and {other} in Transformer Engine's")
        elif not torch.equal(values, te_values):
            problems.append(f"{where}: {name} holds other values")
    return problems


def _all_ranks(problems: list[str]) -> list[str]:
    import torch

    gathered = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, problems)
    return [f"rank {rank}: {problem}" for rank, found in enumerate(gathered) for problem in found]


def _counts(te: dict) -> dict:
    return {"linears": len(te["te_linears"]), "quantizers": len(te["quantizers"]), "tensors": len(te["plain"])}


if __name__ == "__main__":
    report(cases)
