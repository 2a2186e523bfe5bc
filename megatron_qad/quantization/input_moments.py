"""Second moments of the inputs of linears, for the scale rule ``local_hessian``.

The rule weights the rounding error d of 16 weights by H = mean over tokens of x x^T, where x are the 16 inputs that
the weights are multiplied with: d^T H d is the mean square error of their part of the output. H is float32 and takes 64
bytes per input column of each linear and each expert. q, k and v are one linear, and so are gate and up.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_qad.engine.errors import QADError
from megatron_qad.formats.nvfp4 import BLOCK_SIZE
from megatron_qad.quantization.names import linear_weights, name_is_shared, named_modules_globally
from megatron_qad.quantization.smoothing import Groups

MIN_TOKENS = BLOCK_SIZE
"""Minimum number of tokens of a linear or expert. With fewer, H has no full rank, and some errors would be free."""


def block_moments(x: Tensor) -> Tensor:
    """Return the sum of x_j x_j^T over tokens for each block j of 16 columns, float32 [in/16, 16, 16].

    Args:
        x: [tokens, in].
    """
    blocks = x.float().T.reshape(-1, BLOCK_SIZE, len(x))
    return blocks @ blocks.transpose(-1, -2)  # the order of modelopt's additions


@dataclass
class _Input:
    """The input of a linear, or of all local experts' linears, and what was observed of it."""

    module: torch.nn.Module
    names: list[str]
    """Global names of the module's weights: one, or one for each local expert."""
    is_shared: bool
    """Whether the module holds the linears of experts."""
    group: object
    """Process group over which the tokens are split."""
    sums: Tensor
    """float32 [weights, in/16, 16, 16]."""
    num_tokens: Tensor
    """int64 [weights]."""

    @torch.no_grad()
    def observe(self, x: Tensor, tokens_per_expert: Sequence[int] | None = None) -> None:
        """Add an input [..., in]; that of experts is [tokens, in], sorted by expert."""
        x = x.detach().reshape(-1, x.shape[-1])
        parts = [x] if tokens_per_expert is None else x.split([int(n) for n in tokens_per_expert])
        for i, part in enumerate(parts):
            if len(part):
                self.sums[i] += block_moments(part)
                self.num_tokens[i] += len(part)

    def watch(self) -> list:
        """Register hooks that observe the input before it is quantized, as modelopt does. Returns their handles."""
        # The quantizer sees it also where a norm is fused with the linear. It is called even if it is disabled.
        quantizer = self.module.input_quantizer
        if not self.is_shared:
            return [quantizer.register_forward_pre_hook(lambda _, inputs: self.observe(inputs[0]))]
        return [self.module.register_forward_pre_hook(lambda _, inputs: self.observe(*inputs))]

    def reduce(self) -> None:
        """Sum over the ranks of the group. Tokens that several ranks have count several times, in sum and number."""
        if self.group is not None and self.group.size() > 1:
            torch.distributed.all_reduce(self.sums, group=self.group)
            torch.distributed.all_reduce(self.num_tokens, group=self.group)


class InputMoments:
    """The second moments of the inputs of some linears of one student, over all its model chunks on this rank.

    Args:
        chunks: model chunks with activation quantizers, wrapped or not.
        names: global names of weights. Those of other ranks are left out.
        groups: process groups over which the tokens of the inputs are split.

    Example:
        >>> moments = InputMoments(chunks, ["output_layer.weight"], Groups())
        >>> with moments.collecting():
        ...     run_microbatches(chunks)
        >>> moments.of("output_layer.weight").shape
        torch.Size([4, 16, 16])
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], names: Collection[str], groups: Groups):
        names = set(names)
        self._inputs: list[_Input] = []
        self._places: dict[str, tuple[_Input, int]] = {}
        for chunk in chunks:
            for module_name, module in named_modules_globally(chunk):
                if not isinstance(getattr(module, "weight", None), torch.nn.Parameter):
                    continue
                weights = list(linear_weights(module_name, module))
                if not names.isdisjoint(weights):
                    self._add(_Input(module, weights, name_is_shared(module_name), *_zeros(module, weights, groups)))

    def _add(self, observed: _Input) -> None:
        self._inputs.append(observed)
        self._places |= {name: (observed, i) for i, name in enumerate(observed.names)}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Context manager that observes the inputs of forward passes inside it, and then sums over the ranks.

        The passes must run with unquantized weights. Collective over the groups of this rank's inputs.

        Raises:
            QADError: an input contained NaN or Inf.
        """
        handles = [handle for observed in self._inputs for handle in observed.watch()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for observed in self._inputs:
            observed.reduce()
        for observed in self._inputs:
            _check_finite(observed)

    def of(self, name: str) -> Tensor | None:
        """Return H of each block of a weight's columns on this rank, float32 [in/16, 16, 16].

        None means fewer than ``MIN_TOKENS`` tokens. A block whose inputs were always zero gets the identity: they may
        change, and then they are as important as each other.
        """
        observed, i = self._places[name]
        num_tokens = int(observed.num_tokens[i])
        if num_tokens < MIN_TOKENS:
            return None
        moments = observed.sums[i] / num_tokens
        is_dead = moments.diagonal(dim1=-2, dim2=-1).sum(-1) == 0
        return torch.where(is_dead.view(-1, 1, 1), torch.eye(BLOCK_SIZE, device=moments.device), moments)


def _zeros(module: torch.nn.Module, weights: Sequence[str], groups: Groups) -> tuple[object, Tensor, Tensor]:
    """Return the group, sums and numbers of tokens of an input that was not observed yet."""
    weight = module.weight
    if weight.dim() == 3:
        group = groups.expert_data  # expert tensor parallelism gives all its ranks the same tokens
    elif getattr(weight, "tensor_model_parallel", False) and weight.partition_dim == 1:
        group = groups.data  # each rank has columns of its own
    else:
        # Without sequence parallelism all tensor-parallel ranks have the same tokens, which leaves the mean unchanged.
        group = groups.tensor_and_data
    shape = (len(weights), weight.shape[-1] // BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE)
    sums = torch.zeros(shape, dtype=torch.float32, device=weight.device)
    return group, sums, torch.zeros(len(weights), dtype=torch.int64, device=weight.device)


def _check_finite(observed: _Input) -> None:
    is_finite = observed.sums.isfinite().flatten(1).all(1).tolist()
    for name, finite in zip(observed.names, is_finite, strict=True):
        if not finite:
            raise QADError(
                f"calibration: the input of {name.removesuffix('.weight')} contains NaN or Inf, or sums of its squares "
                "overflow; expected finite values below 1e16. Look for NaN in the weights of the layers before it."
            )
