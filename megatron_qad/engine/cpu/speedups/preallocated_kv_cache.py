"""A key-value cache for transformers with preallocated memory for future tokens.

transformers' own cache concatenates: each new token copies all previous ones, in every layer.
"""

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

ROOM = 256
"""Free space, in tokens, after each growth of the memory; everything is copied once per growth."""


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer with full attention. Not supported: beam search and assisted generation."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append s tokens, [b, groups, s, head dim]; return views of all t tokens, [b, groups, t, head dim]."""
        new = (key_states, value_states)
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(*new)
            self._memory = [states[:, :, :0] for states in new]
        if end > self._memory[0].shape[2]:
            self._memory = [_grow(memory, begin, end + ROOM) for memory in self._memory]
        for memory, states in zip(self._memory, new, strict=True):
            memory[:, :, begin:end] = states
        self.keys, self.values = (memory[:, :, :end] for memory in self._memory)
        return self.keys, self.values


def _grow(memory: Tensor, used: int, length: int) -> Tensor:
    larger = memory.new_empty(*memory.shape[:2], length, memory.shape[3])
    larger[:, :, :used] = memory[:, :, :used]
    return larger


def preallocated_cache(config: PreTrainedConfig) -> DynamicCache:
    """Create an empty cache for a model. Layers without full attention keep transformers' own cache."""
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
