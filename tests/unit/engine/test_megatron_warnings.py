"""Warnings of Megatron that say nothing to a user are hidden; the installed version must still contain them."""

import importlib.util
import logging
import warnings
from pathlib import Path

import pytest

from megatron_qad.engine import megatron_warnings

ROOT = Path(importlib.util.find_spec("megatron.core").origin).parents[1]
FILES = (
    *("core/optimizer/__init__.py", "core/optimizer/clip_grads.py", "core/_rank_utils.py", "core/models/backends.py"),
    *("core/extensions/transformer_engine_spec_provider.py", "training/utils/common_utils.py"),
    *("core/dist_checkpointing/strategies/torch.py", "training/arguments.py", "core/tensor_parallel/random.py"),
)


@pytest.fixture
def hidden():
    """Megatron's warnings are hidden in the test, and are not after it."""
    loggers = [logging.getLogger(name) for name in megatron_warnings._LOGGERS]
    filters = [list(logger.filters) for logger in loggers]  # init_runtime has hidden them in the tests' process
    for logger in loggers:
        logger.filters.clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        megatron_warnings.hide()
        yield seen
    for logger, before in zip(loggers, filters, strict=True):
        logger.filters[:] = before


def test_hidden_texts_are_those_of_the_installed_megatron():
    source = "".join((ROOT / file).read_text() for file in FILES)
    hidden = megatron_warnings.HIDDEN + megatron_warnings.HIDDEN_ON_CPU
    assert [text for text in hidden if text not in source] == []


def test_hidden_warnings_do_not_appear_and_others_do(hidden, caplog):
    for text in (*megatron_warnings.HIDDEN, "Another warning"):
        warnings.warn(f"{text} and more", stacklevel=1)
    assert [str(warning.message) for warning in hidden] == ["Another warning and more"]
    logger = logging.getLogger("megatron.core.dist_checkpointing.strategies.torch")
    for text in ("MCore's async save is deprecated and will be removed in the future releases. Use", "a full disk"):
        logger.warning(text)
    assert caplog.messages == ["a full disk"]


def test_warning_about_the_only_generator_of_a_cpu(hidden, caplog):
    """A warning on a GPU; on a CPU, Megatron would log it for every tensor that it initializes."""
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    (text,) = megatron_warnings.HIDDEN_ON_CPU
    logger.warning(text)
    megatron_warnings.hide(on_cpu=True)
    logger.warning(text)
    logger.warning("another")
    assert caplog.messages == [text, "another"]


def test_warning_about_the_type_of_a_model_of_which_only_the_tokenizer_is_loaded(hidden, caplog, monkeypatch):
    """transformers writes it for each load of the tokenizer of a model with code of its own; another one is shown."""
    from transformers import LlamaConfig, PreTrainedConfig

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    config = {"model_type": "NemotronH_Nano_VL_V2"}
    for config_class in (PreTrainedConfig, LlamaConfig):
        monkeypatch.setattr(config_class, "get_config_dict", classmethod(lambda cls, *_, **__: (dict(config), {})))
        config_class.from_pretrained("anything")
    (shown,) = {message for message in caplog.messages if "model of type" in message}
    assert "to instantiate a model of type `llama`" in shown
