"""transformers' cache of keys and values, with room for tokens to come.

Its own joins what it kept with every new token in new memory: each token copies all before it, in every layer.
"""

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

ROOM = 256
"""Tokens that still fit after memory had to be made larger: all is copied once for as many."""


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer with full attention. Left out: what beam search and assistants do to a cache."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Keep s more tokens, [b, groups, s, head dim]; return all t of them, views [b, groups, t, head dim]."""
        new = (key_states, value_states)
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(*new)
            self._memory = [states[:, :, :0] for states in new]
        if end > self._memory[0].shape[2]:
            self._memory = [_larger(memory, begin, end + ROOM) for memory in self._memory]
        for memory, states in zip(self._memory, new, strict=True):
            memory[:, :, begin:end] = states
        self.keys, self.values = (memory[:, :, :end] for memory in self._memory)
        return self.keys, self.values


def _larger(memory: Tensor, used: int, length: int) -> Tensor:
    larger = memory.new_empty(*memory.shape[:2], length, memory.shape[3])
    larger[:, :, :used] = memory[:, :, :used]
    return larger


def preallocated_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache for a model of this config. What layers of other kinds keep is transformers' own."""
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
