"""Checks prepared data on ranks whose machines have their own copies of it, for test_validation."""

import os
from argparse import Namespace

import torch


def check(directory: str, prefixes: list[str]) -> None:
    """Check the data of each relative prefix; rank r is in ``directory``/machine{r}. Prints the result of each."""
    from megatron_qad.data.checks import check_data
    from megatron_qad.data.data_options import DataOptions
    from megatron_qad.engine.errors import QADError

    torch.distributed.init_process_group("gloo")
    os.chdir(f"{directory}/machine{torch.distributed.get_rank()}")
    args = Namespace(tokenizer_type="NullTokenizer", tokenizer_model=None, null_tokenizer_eod_id=None)
    args.data_cache_path, args.eod_mask_loss = f"{directory}/cache", False
    for prefix in prefixes:
        try:
            check_data(args, [prefix], DataOptions(calibration_samples=8))
            print(f"{prefix}: whole", flush=True)
        except QADError as error:
            print(f"{prefix}: {error}", flush=True)
