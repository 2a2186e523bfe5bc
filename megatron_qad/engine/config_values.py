"""Typed reading of a model's ``config.json``, which others wrote: each wrong value is one error with key and value.

A key that is missing or null takes the default; without a default it is an error. Text, floats and booleans are not
converted to integers: servers and transformers 5 refuse them too. The upper limits keep a damaged number from building
lists for hours, and are far above every released model.
"""

import math
import sys
from collections.abc import Mapping
from typing import Any

from megatron_qad.engine.errors import QADError

MAX_SIZE = 2**24
"""Largest size of a dimension (vocabulary, width, head): 16 times the widest released MLP and 64 times the largest
vocabulary. A weight of this width and of 4,096 rows has 128 GiB in BF16."""
MAX_LAYERS = 4096
"""Largest number of layers: 25 times the deepest released model."""
MAX_EXPERTS = 2**17
"""Largest number of experts, of one layer and of a whole model: each has a few entries in the lists of tensors, which
then take two seconds. Released models have up to 31,000 in all."""
MAX_POSITIONS = 2**31 - 1
"""Largest context length: positions are int32 in the attention kernels."""

Config = dict[str, Any]
_DTYPES = ("bfloat16", "float16", "float32")
_PLURALS = {dict: "objects", int: "integers", str: "strings"}
_FLOAT_MAX = sys.float_info.max  # JSON integers can be larger, and NaN compares false


class _Required:
    """Default of a key that must be in the config."""


REQUIRED = _Required()


class Section(dict):
    """An object inside of ``config.json``. ``where`` is its place for error messages, ``config.json: llm_config``."""

    where: str = "config.json"


def place(config: Config) -> str:
    """Return the start of an error message about a value of ``config``."""
    return getattr(config, "where", Section.where)


def integer(
    config: Config, key: str, default: int | None | _Required = REQUIRED, *, minimum: int = 1, maximum: int = MAX_SIZE
) -> Any:
    """Return the integer at ``key``, from ``minimum`` to ``maximum``.

    Raises:
        QADError: there is none and no default, it is not an integer (text, a float, a boolean), or it is out of range.

    Example::

        integer({"hidden_size": 64}, "hidden_size")  # 64
        integer({"hidden_size": "64"}, "hidden_size")  # QADError
        integer({}, "head_dim", 128)  # 128
    """
    value = _value(config, key, default)
    if value is _MISSING:
        return default
    if type(value) is not int or not minimum <= value <= maximum:
        raise _wrong(config, key, value, f"an integer from {minimum:,} to {maximum:,}")
    return value


def number(
    config: Config,
    key: str,
    default: float | None | _Required = REQUIRED,
    *,
    above: float = -math.inf,
    maximum: float = math.inf,
) -> Any:
    """Return the finite number (integer or float) at ``key``, greater than ``above`` and at most ``maximum``."""
    value = _value(config, key, default)
    if value is _MISSING:
        return default
    if type(value) not in (int, float) or not -_FLOAT_MAX <= value <= _FLOAT_MAX or not above < value <= maximum:
        limits = [f"above {above:g}"] * (above > -math.inf) + [f"at most {maximum:g}"] * (maximum < math.inf)
        raise _wrong(config, key, value, " ".join(["a number", " and ".join(limits)]).rstrip())
    return value


def flag(config: Config, key: str, default: bool | _Required = REQUIRED) -> bool:
    """Return the boolean at ``key``."""
    value = _value(config, key, default)
    if value is _MISSING:
        return bool(default)
    if type(value) is not bool:
        raise _wrong(config, key, value, "true or false")
    return value


def text(config: Config, key: str, default: str | _Required = REQUIRED) -> Any:
    """Return the string at ``key``."""
    value = _value(config, key, default)
    if value is not _MISSING and not isinstance(value, str):
        raise _wrong(config, key, value, "text")
    return default if value is _MISSING else value


def items[T](config: Config, key: str, kind: type[T], default: list[T] | None | _Required = REQUIRED) -> Any:
    """Return the list at ``key``, whose items are all of type ``kind`` (``dict``, ``int``, ``str``)."""
    value = _value(config, key, default)
    if value is _MISSING:
        return default
    if not isinstance(value, list):
        raise _wrong(config, key, value, f"a list of {_PLURALS[kind]}")
    for index, item in enumerate(value):
        if type(item) is not kind:
            raise _wrong(config, f"{key}[{index}]", item, f"one of a list of {_PLURALS[kind]}")
    return value


def section(config: Config, key: str, default: Config | None | _Required = REQUIRED) -> Any:
    """Return the object at ``key`` as a ``Section``, so that errors about its values name it."""
    value = _value(config, key, default)
    if value is _MISSING:
        value = default
    if value is not None and not isinstance(value, dict):
        raise _wrong(config, key, value, "an object")
    return None if value is None else _named(value, f"{place(config)}: {key}")


def with_defaults(config: Config, defaults: Mapping[str, Any]) -> Section:
    """Return the config with ``defaults`` for the keys that it lacks. A null stays null."""
    return _named({**defaults, **config}, place(config))


def entries(config: Config, key: str) -> list[Section]:
    """Return the list of objects at ``key`` as ``Section`` objects."""
    return [_named(value, f"{place(config)}: {key}[{index}]") for index, value in enumerate(items(config, key, dict))]


def dtype_name(config: Config) -> str | None:
    """Return ``dtype`` (in older files ``torch_dtype``), such as "bfloat16"; None if the config has neither.

    Raises:
        QADError: both are there and differ, or it is not a dtype of weights (``auto``, an integer or FP8 dtype).
    """
    names = {key: text(config, key).removeprefix("torch.") for key in ("dtype", "torch_dtype") if config.get(key)}
    for key, name in names.items():
        if name not in _DTYPES:
            raise _wrong(config, key, name, " or ".join(_DTYPES))
    if len(set(names.values())) > 1:
        raise QADError(f"{place(config)}: dtype {names['dtype']} and torch_dtype {names['torch_dtype']} differ.")
    return next(iter(names.values()), None)


_MISSING = object()


def _value(config: Config, key: str, default: object) -> Any:
    value = config.get(key)
    if value is not None:
        return value
    if default is REQUIRED:
        found = " Found null." if key in config else ""
        raise QADError(f"{place(config)}: no {key!r}, which is required.{found}")
    return _MISSING


def _named(value: dict, where: str) -> Section:
    named = Section(value)
    named.where = where
    return named


def _wrong(config: Config, key: str, value: object, expected: str) -> QADError:
    found = {str: "the text ", bool: "the boolean ", list: "the list ", dict: "the object "}.get(type(value), "")
    return QADError(f"{place(config)}: {key} is {found}{value!r:.100}, expected {expected}.")
