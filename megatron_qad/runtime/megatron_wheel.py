"""What Megatron's wheel lacks to run from a wheel, on any machine."""

import importlib.util

from megatron_qad.runtime.errors import QADError


def use_compiled_dataset_helpers() -> None:
    """Keep Megatron from compiling its dataset helpers at start-up.

    The wheel ships them compiled but without the Makefile that ``compile_helpers`` runs, so that every start would
    fail.
    """
    from megatron.core.datasets import utils

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        raise QADError("megatron-core has no compiled dataset helpers (helpers_cpp); install it from its wheel")
    utils.compile_helpers = lambda: None
