"""Bytes that the layers of a model keep for the backward pass of one microbatch.

The formulas list the tensors that autograd saves, each storage once. A fake-quantized input is a tensor of its own,
which replaces the unquantized one unless something else keeps that. Not counted: parameters, the batch, temporary
tensors, gradients of activations, and communication buffers.

``LOCAL`` is what the layers of the local spec keep on a CPU: tests/dist/test_saved_activations.py compares it with
torch's ``saved_tensors_hooks``. The other two are derived from the sources of their kernels and have not been measured:
``LOCAL_GPU`` has torch's fused norm and the kernels of ``mamba_ssm``, ``TE`` also the layers of Transformer Engine.
"""

from dataclasses import dataclass

from megatron_qad.models.families.base import ParamMapping
from megatron_qad.planning.layer_sizes import PlannedModel
from megatron_qad.planning.layout import Layout

_FLOAT, _INT = 4, 8
_SCAN_CHUNK = 128
"""Tokens of a chunk of Mamba's scan: Megatron's default, which no family changes."""
_FIRST_EXPERT = "mlp.experts.experts.0."


@dataclass(frozen=True)
class Kernels:
    """What the operations between the linears keep. The fields are differences between layer specs and devices."""

    name: str
    """Name for the plan."""
    is_measured: bool
    """Whether a test compares the formulas with counted bytes."""
    has_fused_norm: bool
    """Whether a norm keeps its input and one float32 per row, instead of two float32 copies of the input."""
    has_fused_scan: bool
    """Whether Mamba's convolution and scan keep their inputs and compute the rest again."""
    is_te: bool
    """Whether attention rotates in one kernel, keeps only local keys under context parallelism, and shares its output
    with the projection."""

    def describe(self) -> str:
        """Return a phrase for the plan."""
        return f"{self.name}, {'measured' if self.is_measured else 'not measured'}"


LOCAL = Kernels("local layers on a CPU", True, False, False, False)
LOCAL_GPU = Kernels("local layers on a GPU", False, True, True, False)
TE = Kernels("Transformer Engine", False, True, True, True)


def kernels_of(layer_spec: str, on_gpu: bool) -> Kernels:
    """Return the kernels of a layer spec ("te" or "local")."""
    if layer_spec == "te":
        return TE
    return LOCAL_GPU if on_gpu else LOCAL


@dataclass(frozen=True)
class Saved:
    """Bytes that one layer keeps."""

    kept: int
    """From its forward to its backward pass."""
    recomputed: int = 0
    """In addition during its backward pass, under selective recomputation."""


def saved_by_layers(model: PlannedModel, layout: Layout, kernels: Kernels) -> list[Saved]:
    """Return the bytes of each layer of the model on one rank for one microbatch. Full recomputation is ignored.

    Routed tokens are counted as if every expert received the same number.
    """
    layers = _Layers(model, layout, kernels)
    kinds = {"*": layers.attention, "-": layers.mlp, "E": layers.experts, "M": layers.mamba}
    # Layers of one kind and shape are computed once: a model has few of them.
    known: dict[tuple, Saved] = {}
    saved = []
    for symbol, tensors in zip(model.pattern, model.by_layer, strict=True):
        shapes = tuple(
            (name, t.shape, model.quantizes_input(t)) for name, t in tensors.items() if ".experts." not in name
        )
        key = (
            symbol,
            shapes,
            model.quantizes_input(tensors[f"{_FIRST_EXPERT}linear_fc1.weight"]) if symbol == "E" else 0,
        )
        if key not in known:
            known[key] = kinds[symbol](tensors)
        saved.append(known[key])
    return saved


def final_norm_bytes(model: PlannedModel, layout: Layout, kernels: Kernels) -> int:
    """Return what the norm after the last layer keeps."""
    return _Layers(model, layout, kernels).norm(layout.sharded_tokens, model.hidden_size)


def embedding_bytes(layout: Layout) -> int:
    """Return what the embedding keeps: with tensor parallelism a copy of the tokens, and which of them are its own."""
    return (_INT + 1) * layout.tokens if layout.tp > 1 else 0


class _Layers:
    """The formulas. ``t`` counts the tokens of a microbatch on a context-parallel rank, ``ts`` those of a
    sequence-parallel one; names of widths are those of a tensor-parallel rank."""

    def __init__(self, model: PlannedModel, layout: Layout, kernels: Kernels):
        self.model, self.layout, self.kernels = model, layout, kernels
        self.hidden, self.width = model.hidden_size, layout.element_bytes
        self.t, self.ts = layout.tokens, layout.sharded_tokens
        self.is_gated = bool(model.args.get("swiglu"))

    def norm(self, rows: int, size: int) -> int:
        """An RMS norm over the last axis of [rows, size]."""
        copies = self.width if self.kernels.has_fused_norm else 2 * _FLOAT
        return rows * (copies * size + _FLOAT)

    def norm_and_input(self) -> int:
        """A layer's norm and the input of the linear after it, quantized or not."""
        return self.norm(self.ts, self.hidden) + self.ts * self.hidden * self.width

    def activation(self, rows: int, inner: int) -> int:
        """SwiGLU, or squared ReLU, which keeps ReLU's output; and the input of the linear after it."""
        return rows * inner * self.width * ((2 if self.is_gated else 1) + 1)

    def attention(self, tensors: dict[str, ParamMapping]) -> Saved:
        """QKV projection, norms of query and key, rotary embedding, core attention, projection."""
        layout, t, width = self.layout, self.t, self.width
        qkv, proj = tensors["self_attention.linear_qkv.weight"], tensors["self_attention.linear_proj.weight"]
        heads, groups, dim = qkv.num_heads // layout.tp, qkv.num_groups // layout.tp, qkv.head_dim
        query, key = heads * dim * width, groups * dim * width  # bytes per token; values have those of keys
        is_normed, is_rotated = "self_attention.q_layernorm.weight" in tensors, self._is_rotated
        size = self.norm_and_input() + t * query  # the second is the input of the projection
        if is_normed:
            size += self.norm(t * heads, dim) + self.norm(t * groups, dim)
        if is_rotated and not self.kernels.is_te:
            positions = t if layout.is_packed else layout.seq_length // layout.cp
            size += 4 * positions * dim * width  # cosines and sines, separately for query and key
        # The value is a view of the projection's output, which stays whole, unless the value is quantized or gathered.
        # A reshaped query is a copy, unless every head has a key of its own.
        is_copied = is_normed or is_rotated or heads != groups
        inputs = t * query * is_copied
        if self.model.quantizes_kv:
            inputs += 2 * t * key
        else:
            inputs += t * (query + 2 * key) + t * key * (is_normed or is_rotated)
        core = t * query + t * heads * _FLOAT  # output, and the logarithm of each softmax's sum
        if layout.cp > 1 and not self.kernels.is_te:
            gathered = t * query * is_copied + 2 * layout.cp * t * key
            if layout.recompute == "selective":
                core += gathered
            else:
                inputs = gathered
            core += self._mask_bytes()
        # The projection's input is the output of the attention, unless it is quantized or joined from several parts.
        if not self.model.quantizes_input(proj) and (self.kernels.is_te or layout.cp == 1 and not layout.is_packed):
            size -= t * query
        if layout.recompute == "selective":
            return Saved(size + inputs, core)
        return Saved(size + inputs + core)

    @property
    def _is_rotated(self) -> bool:
        return self.model.args.get("position-embedding-type") == "rope"

    def _mask_bytes(self) -> int:
        """The masks of context-parallel chunks, which the CPU's kernel needs in full. A row is one document here."""
        if self.kernels.has_fused_norm:
            return 0
        chunk = self.layout.seq_length // (2 * self.layout.cp)
        return (2 * self.layout.cp + 1) * chunk**2 * self.width

    def mlp(self, tensors: dict[str, ParamMapping]) -> Saved:
        inner = tensors["mlp.linear_fc2.weight"].shape[1] // self.layout.tp
        return Saved(self.norm_and_input() + self.activation(self.t, inner))

    def experts(self, tensors: dict[str, ParamMapping]) -> Saved:
        """Router, permutation, shared experts and the experts of this rank."""
        args, layout, ts, width = self.model.args, self.layout, self.ts, self.width
        num_experts, top_k = args["num-experts"], args["moe-router-topk"]
        size = self.norm_and_input()  # the norm, and the router's input
        # Chosen experts, their probabilities; for sigmoid routers all probabilities and the sum of the chosen ones.
        size += ts * top_k * (_INT + _FLOAT)
        if args.get("moe-router-score-function") == "sigmoid":
            size += ts * (num_experts + 1) * _FLOAT
        # The permutation sorts a mask [experts, tokens] and keeps the whole result, and the indices of the chosen.
        size += ts * (num_experts + top_k) * _INT
        shared = tensors.get("mlp.shared_experts.linear_fc1.weight")
        if shared is not None:
            size += ts * self.hidden * width * self.model.quantizes_input(shared)
            inner = tensors["mlp.shared_experts.linear_fc2.weight"].shape[1] // layout.tp
            size += self.activation(self.t, inner)
        latent = tensors.get("mlp.fc1_latent_proj.weight")
        if latent is not None:
            size += ts * self.hidden * width * self.model.quantizes_input(latent)
            size += ts * latent.shape[0] * width  # the input of the projection back
        rows = ts * top_k * layout.etp
        outputs, inputs = tensors[f"{_FIRST_EXPERT}linear_fc1.weight"].shape
        inner = tensors[f"{_FIRST_EXPERT}linear_fc2.weight"].shape[1] // layout.etp
        size += rows * inputs * width + self.activation(rows, inner)
        # The probability of each row. Squared ReLU also keeps its output, which the probability multiplies.
        size += rows * width if self.is_gated else rows * (_FLOAT + inner * width)
        return Saved(size)

    def mamba(self, tensors: dict[str, ParamMapping]) -> Saved:
        """Projections, convolution, scan, gate and norm. Context parallelism divides the heads between them."""
        args, layout, width = self.model.args, self.layout, self.width
        shards = layout.tp * layout.cp
        t = self.t * layout.cp  # all tokens
        heads, dim, state = args["mamba-num-heads"] // shards, args["mamba-head-dim"], args["mamba-state-dim"]
        groups = max(1, args["mamba-num-groups"] // shards)
        inner = heads * dim
        channels = inner + 2 * groups * state
        size = self.norm_and_input() + self.t * args["mamba-num-heads"] * dim // layout.tp * width  # input of out_proj
        if self.kernels.has_fused_scan:
            # Inputs of the scan, its output, the norm's input, and a float32 for each group.
            return Saved(size + t * ((2 * inner + channels - inner + heads + 2 * inner) * width + groups * _FLOAT))
        conv_width = tensors["mixer.conv1d.weight"].shape[-1]
        size += t * channels * _FLOAT * (conv_width + 1)  # each lag's input, and the input of silu
        size += t * 6 * inner * _FLOAT  # x; the gate, its silu and the output; two copies in the norm
        size += t * groups * _FLOAT
        return Saved(size + self._scan(t, heads, dim, state))

    def _scan(self, t: int, heads: int, dim: int, state: int) -> int:
        """The chunked scan in torch (engine/cpu/ssd.py), in float32."""
        rows = 1 if self.layout.is_packed else self.layout.micro_batch_size
        chunk = min(_SCAN_CHUNK, t // rows)
        per_head = 4 * chunk  # four matrices [chunk, chunk]: decay, B C^T, their product, and with the step size
        per_head += 5 + dim * state // chunk  # step sizes, decays; a state for each chunk
        # The products with a state. With one row, B, C and x are views of tensors that exist once; with several, each
        # product copies its operands.
        per_head += 2 * dim + (2 * state if rows == 1 else 4 * state + dim)
        if self.layout.is_packed:
            per_head += 3
        return t * heads * per_head * _FLOAT
