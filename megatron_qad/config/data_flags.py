"""Checks the flags that name the data. The data itself is checked where it is read (``data.provider``)."""

from megatron_qad.config.megatron_flags import MegatronFlags
from megatron_qad.engine.errors import QADError

_WHOLE = ("data_path", "data_args_path", "per_split_data_args_path", "mock_data")
_PER_SPLIT = ("train_data_path", "valid_data_path", "test_data_path")


def check_data_flags(flags: MegatronFlags) -> None:
    """Check that the data is given once.

    Raises:
        QADError: two flags both give the data.
    """
    given = [name for name in _WHOLE if getattr(flags, name)]
    given += [name for name in _PER_SPLIT if getattr(flags, name)][:1]
    if len(given) > 1:
        first, second = (f"--{name.replace('_', '-')}" for name in given[:2])
        raise QADError(
            f"{first} and {second} both give the data. Give --data-path, which --split divides, or one flag for each "
            "split (--train-data-path, --valid-data-path)."
        )
