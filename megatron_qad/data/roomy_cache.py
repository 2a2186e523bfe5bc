"""transformers' cache of keys and values, with room from the start for all that will be written.

Its own joins what it kept with every new token in new memory: each token copies all before it, in every layer.
"""

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer with full attention. Left out: what beam search and assistants do to a cache.

    Args:
        max_length: tokens that will be kept at most.
    """

    def __init__(self, max_length: int):
        super().__init__()
        self._max_length = max_length

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Keep s more tokens, [b, groups, s, head dim]; return all t of them, views [b, groups, t, head dim]."""
        new = (key_states, value_states)
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(*new)
            self._room = [states.new_empty(*states.shape[:2], self._max_length, states.shape[3]) for states in new]
        for room, states in zip(self._room, new, strict=True):
            room[:, :, begin:end] = states
        self.keys, self.values = (room[:, :, :end] for room in self._room)
        return self.keys, self.values


def roomy_cache(config: PreTrainedConfig, max_length: int) -> DynamicCache:
    """A cache for prompts and answers of together at most ``max_length`` tokens. What layers of other kinds keep is
    transformers' own."""
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    cache.layers = [RoomyLayer(max_length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
