"""Worker: saves models as Megatron-LM does, imports them, and compares the logits on both sides.

``arguments["cases"]`` is a list of {"case", "directory", "tp", "metadata", "train"}: a name in ``CASES``, a new
directory, the tensor-parallel size, the metadata of ``sharded_state_dict``, and whether to take an optimizer step and
to save the optimizer. Each result is the largest error of the logits of the imported model in the project's
``HybridModel``, and of the exported model in transformers.
"""

import json
from argparse import ArgumentParser, Namespace
from contextlib import contextmanager
from pathlib import Path

import tiny_hybrids
import tiny_models
from launch import report
from tiny_job import LLAMA

QWEN3_MOE = tiny_hybrids.QWEN3_MOE
NEMOTRON_H = tiny_hybrids.WHOLE["nemotron-h"]
CASES = {
    "llama": LLAMA,
    # Megatron's constants of rope scaling
    "llama3-rope": LLAMA
    | {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    },
    "qwen2": LLAMA
    | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "head_dim": None, "tie_word_embeddings": True},
    "qwen3": LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "qwen3-moe": QWEN3_MOE,
    "nemotron-nas": tiny_hybrids.NEMOTRON_NAS,
    "nemotron-h": NEMOTRON_H,
}
_SEQ_LENGTH = 32


def cases(arguments: dict) -> list[dict]:
    import worker_job  # noqa: F401  first, because it initializes the runtime

    from megatron_qad.engine.distributed import init_process_group

    init_process_group()
    return [_result(**case) for case in arguments["cases"]]


def _result(case: str, directory: str, tp: int, metadata: dict | None, train: bool) -> dict:
    import torch
    import worker_models
    from worker_job import job

    from megatron_qad.checkpoint.export_hf import export_hf
    from megatron_qad.checkpoint.import_hf import import_hf
    from megatron_qad.checkpoint.import_megatron import import_megatron

    root, config = Path(directory), _config(case)
    if torch.distributed.get_rank() == 0:
        (root / "hf").mkdir(parents=True)
        (root / "hf" / "config.json").write_text(json.dumps(config))
        tiny_models.tokenizer(config["vocab_size"]).save_pretrained(root / "hf")
    tokens = torch.randint(0, config["vocab_size"], (4, _SEQ_LENGTH), generator=torch.Generator().manual_seed(5))
    expected = _save(config, root / "megatron", tokens, tp, metadata, train)[..., : config["vocab_size"]]
    num_tensors = import_megatron(root / "megatron", root / "hf", root / "imported", torch.float32)
    flags = ["--sequence-parallel"] if tp > 1 else []  # which expert layers need
    with job(str(root / "imported"), tp, 1, *worker_models._sizes(tokens.shape), *flags) as started:
        actual = worker_models._logits(started, tokens)
        result = {"case": case, "num_tensors": num_tensors, **worker_models._compare(actual, expected)}
    if tp == 1:
        export_hf(root / "imported", root / "out", "bf16")
        with torch.no_grad():
            logits = tiny_hybrids.by_transformers(root / "out")(tokens, use_cache=False).logits
        result["transformers"] = (logits - expected).abs().max().item()
        import_hf(root / "out", root / "again", torch.float32)
        result["differ_from_import_hf"] = _differences(root / "again", root / "imported")
    return result


def _differences(expected: Path, actual: Path) -> list[str]:
    """Return the names of the tensors that are not the same in two checkpoint directories."""
    import torch

    from megatron_qad.checkpoint.slice_reader import Slice, SliceReader

    readers = [SliceReader(root / "release") for root in (expected, actual)]
    if readers[0].stored != readers[1].stored:
        return sorted(readers[0].stored.items() ^ readers[1].stored.items())
    slices = [Slice(name, (0,) * len(x.shape), x.shape) for name, x in readers[0].stored.items()]
    pairs = zip(slices, *(reader.read(slices) for reader in readers), strict=True)
    return [part.name for part, one, other in pairs if not torch.equal(one, other)]


def _config(case: str) -> dict:
    return {key: value for key, value in CASES[case].items() if value is not None} | {"torch_dtype": "float32"}


def _save(config: dict, root: Path, tokens, tp: int, metadata: dict | None, train: bool):
    """Save a random model of Megatron as its training loop does, as iteration 10. Returns its logits, gathered."""
    import torch
    from megatron.core import dist_checkpointing, mpu
    from megatron.core.dist_checkpointing import ShardedObject

    from megatron_qad.engine.megatron_fixes import save_checkpoints_in_this_process

    save_checkpoints_in_this_process()
    with _model_parallel(tp):
        model, args = _model(config)
        _randomize(model)
        replica = mpu.get_tensor_model_parallel_rank()
        state = {"args": args, "checkpoint_version": 3.0, "iteration": 10}
        state["rng_state"] = ShardedObject("rng_state", [torch.get_rng_state()], (1,), (0,), replica_id=replica)
        sharded = model.sharded_state_dict(metadata=metadata)
        if train:
            state["optimizer"] = _optimizer_state(model, sharded, tokens)
        logits = _logits(model.eval(), tokens).detach()
        directory = root / "iter_0000010"
        if torch.distributed.get_rank() == 0:
            directory.mkdir(parents=True)
        torch.distributed.barrier()
        dist_checkpointing.save({**state, "model": sharded}, str(directory))
        (root / "latest_checkpointed_iteration.txt").write_text("10")
        shards = [torch.empty_like(logits) for _ in range(tp)]
        torch.distributed.all_gather(shards, logits.contiguous(), group=mpu.get_tensor_model_parallel_group())
        return torch.cat(shards, dim=-1)


@contextmanager
def _model_parallel(tp: int):
    from megatron.core import mpu
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    mpu.initialize_model_parallel(tensor_model_parallel_size=tp)
    model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        mpu.destroy_model_parallel()


def _logits(model, tokens):
    import torch

    positions = torch.arange(_SEQ_LENGTH).expand_as(tokens)
    later = torch.ones(1, 1, _SEQ_LENGTH, _SEQ_LENGTH, dtype=torch.bool).triu(1)
    return model(tokens, positions, later)


def _randomize(model) -> None:
    """Make every parameter random: replicated ones equal on all ranks, the shards of others different."""
    import torch
    from megatron.core import mpu

    for i, (name, parameter) in enumerate(model.named_parameters()):
        is_sharded = getattr(parameter, "tensor_model_parallel", False)
        rank = mpu.get_tensor_model_parallel_rank() if is_sharded else 0
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * rank + i))
        with torch.no_grad():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.15 * noise)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=torch.Generator().manual_seed(7)))


def _optimizer_state(model, sharded: dict, tokens) -> dict:
    """Take a step of Adam. Returns its state as Megatron saves that of an optimizer that is not distributed."""
    import torch
    from megatron.core.dist_checkpointing.optimizer import (
        get_param_id_to_sharded_param_map,
        optim_state_to_sharding_state,
    )

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    _logits(model, tokens).square().mean().backward()
    optimizer.step()
    state = optimizer.state_dict()
    ids = get_param_id_to_sharded_param_map(sharded, model.parameters())
    optim_state_to_sharding_state(state, ids, exclude_keys=("step",))
    return state


def _model(config: dict):
    """Return the model of a Hugging Face config, built from Megatron's arguments of its own, and these arguments."""
    if config["model_type"] == "nemotron_h":
        return _hybrid(config)
    return _gpt(config)


def _arguments(flags: dict) -> Namespace:
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(ArgumentParser(allow_abbrev=False))
    words = [
        word
        for name, value in flags.items()
        for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]
    return parser.parse_args(words)


def _transformer_config(cls, args: Namespace, **fields):
    import torch
    from megatron.core.activations import squared_relu

    return cls(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        kv_channels=args.kv_channels,
        layernorm_epsilon=args.layernorm_epsilon,
        normalization=args.normalization,
        gated_linear_unit=args.swiglu,
        activation_func=torch.nn.functional.silu if args.swiglu else squared_relu,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        qk_layernorm=args.qk_layernorm,
        num_moe_experts=args.num_experts,
        moe_router_topk=args.moe_router_topk,
        moe_ffn_hidden_size=args.moe_ffn_hidden_size,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        tensor_model_parallel_size=_tp(),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        **fields,
    )


def _tp() -> int:
    from megatron.core import mpu

    return mpu.get_tensor_model_parallel_world_size()


def _gpt(config: dict):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig

    kind, heads = config["model_type"], config["num_attention_heads"]
    flags = {
        "num-layers": config["num_hidden_layers"],
        "hidden-size": config["hidden_size"],
        "ffn-hidden-size": config.get("intermediate_size", 256),
        "num-attention-heads": heads,
        "kv-channels": config.get("head_dim", config["hidden_size"] // heads),
        "max-position-embeddings": 512,
        "norm-epsilon": config["rms_norm_eps"],
        "rotary-base": 10000,
        "position-embedding-type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "disable-bias-linear": True,
    }
    if kind != "nemotron-nas":
        flags |= {"group-query-attention": True, "num-query-groups": config["num_key_value_heads"]}
    if not config["tie_word_embeddings"]:
        flags["untie-embeddings-and-output-weights"] = True
    if kind == "qwen2":
        flags["add-qkv-bias"] = True
    if kind.startswith("qwen3"):
        flags["qk-layernorm"] = True
    if kind == "qwen3_moe":
        flags |= {"num-experts": config["num_experts"], "moe-router-topk": config["num_experts_per_tok"]}
        flags |= {"moe-ffn-hidden-size": config["moe_intermediate_size"]}
    if config.get("rope_scaling"):
        flags |= {"use-rope-scaling": True, "rope-scaling-factor": config["rope_scaling"]["factor"]}
    args = _arguments(flags)
    if kind == "nemotron-nas":
        blocks = {"heterogeneous_layers_config_encoded_json": json.dumps(config)}
        transformer = _transformer_config(HeterogeneousTransformerConfig, args, **blocks)
        spec = get_gpt_heterogeneous_layer_spec(transformer)
    else:
        transformer = _transformer_config(TransformerConfig, args)
        options = {"num_experts": args.num_experts, "qk_layernorm": args.qk_layernorm}
        spec = get_gpt_layer_local_spec(normalization="RMSNorm", **options)
    model = GPTModel(
        transformer,
        spec,
        vocab_size=128 * _tp(),
        max_sequence_length=512,
        position_embedding_type="rope",
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
    )
    return model, args


def _hybrid(config: dict):
    """Return a ``HybridModel`` with Megatron's experts; other layers are this project's, not Transformer Engine's."""
    from dataclasses import replace

    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer import TransformerConfig

    from megatron_qad.models.specs import hybrid_stack_spec

    pattern = config["hybrid_override_pattern"]
    flags = {
        "num-layers": len(pattern),
        "hybrid-layer-pattern": pattern,
        "hidden-size": config["hidden_size"],
        "ffn-hidden-size": config["intermediate_size"],
        "num-attention-heads": config["num_attention_heads"],
        "group-query-attention": True,
        "num-query-groups": config["num_key_value_heads"],
        "kv-channels": config["head_dim"],
        "norm-epsilon": config["layer_norm_epsilon"],
        "position-embedding-type": "none",
        "normalization": "RMSNorm",
        "squared-relu": True,
        "disable-bias-linear": True,
        "untie-embeddings-and-output-weights": True,
        "mamba-num-heads": config["mamba_num_heads"],
        "mamba-head-dim": config["mamba_head_dim"],
        "mamba-num-groups": config["n_groups"],
        "mamba-state-dim": config["ssm_state_size"],
        "num-experts": config["n_routed_experts"],
        "moe-router-topk": config["num_experts_per_tok"],
        "moe-ffn-hidden-size": config["moe_intermediate_size"],
        "moe-shared-expert-intermediate-size": config["moe_shared_expert_intermediate_size"],
        "moe-router-score-function": "sigmoid",
        "moe-router-enable-expert-bias": True,
        "moe-router-dtype": "fp32",
        "moe-router-topk-scaling-factor": config["routed_scaling_factor"],
    }
    args = _arguments(flags)
    names = ["moe_shared_expert_intermediate_size", "moe_router_score_function", "moe_router_enable_expert_bias"]
    names += ["mamba_num_heads", "mamba_head_dim", "mamba_num_groups", "mamba_state_dim"]
    names += ["moe_router_dtype", "moe_router_topk_scaling_factor"]
    transformer = _transformer_config(
        TransformerConfig, args, is_hybrid_model=True, **{name: getattr(args, name) for name in names}
    )
    stack = hybrid_stack_spec("local", qk_layernorm=False)
    experts = get_moe_module_spec(use_te=False, num_experts=args.num_experts, moe_grouped_gemm=False)
    moe_layer = stack.submodules.moe_layer
    moe_layer = replace(moe_layer, submodules=replace(moe_layer.submodules, mlp=experts))
    model = HybridModel(
        transformer,
        replace(stack, submodules=replace(stack.submodules, moe_layer=moe_layer)),
        vocab_size=128 * _tp(),
        max_sequence_length=512,
        hybrid_layer_pattern=pattern,
        share_embeddings_and_output_weights=False,
        position_embedding_type="none",
    )
    return model, args


if __name__ == "__main__":
    report(cases)
