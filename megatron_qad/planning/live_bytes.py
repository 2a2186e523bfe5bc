"""Counts the bytes that autograd keeps for backward passes, which the planner's formulas predict."""

from collections import Counter
from collections.abc import Iterable

import torch


class LiveBytes:
    """Counts the bytes of the tensors that autograd holds at a time, each storage once.

    Example::

        live = LiveBytes(model.parameters())
        with live.counting():
            model(x).sum().backward()
        print(live.peak)

    Args:
        ignored: tensors whose storages are not counted: parameters, the batch.
    """

    def __init__(self, ignored: Iterable[torch.Tensor]):
        self._ignored = {tensor.untyped_storage().data_ptr() for tensor in ignored}
        self._num_holders: Counter[int] = Counter()
        self.now = self.peak = 0

    def counting(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Context manager that counts the tensors saved inside of it until their backward pass has used them."""
        return torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Saved(self, tensor), lambda saved: saved.tensor)

    def change(self, storage: torch.UntypedStorage, by: int) -> None:
        """Add or remove a holder of a storage."""
        key = storage.data_ptr()
        if key in self._ignored:
            return
        before = self._num_holders[key]
        self._num_holders[key] += by
        self.now += (bool(before + by) - bool(before)) * storage.nbytes()
        self.peak = max(self.peak, self.now)


class _Saved:
    """A tensor that autograd holds. Autograd drops the object when it no longer needs the tensor."""

    def __init__(self, counter: LiveBytes, tensor: torch.Tensor):
        self.tensor, self._counter = tensor.detach(), counter
        self._storage = tensor.untyped_storage()
        counter.change(self._storage, 1)

    def __del__(self):
        self._counter.change(self._storage, -1)
