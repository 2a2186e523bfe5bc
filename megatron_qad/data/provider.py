"""Provider of the training and validation datasets of ``pretrain()``, built from ``--data-path`` and similar flags.

The data is checked first (``checks``). Not supported: mock data, fill-in-the-middle, Megatron's ``--sft`` packing, data
in object storage.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.core.datasets.utils import Split
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import print_rank_0
from megatron.training.utils import is_first_or_last_pipeline_stage

from megatron_qad.data.blending import QADBlendBuilder
from megatron_qad.data.blends import Blend, notes, parse_split, read_blends
from megatron_qad.data.checks import check_data
from megatron_qad.data.data_options import DataOptions
from megatron_qad.data.dataset import QADDataset, QADDatasetConfig
from megatron_qad.data.epochs import describe_epochs
from megatron_qad.data.validation_set import (
    DEFAULT_TOKENS,
    ValidationSet,
    config_for_split,
    ordered_samples,
    samples_per_iteration,
)
from megatron_qad.engine.distributed import on_rank_0
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.text_files import read_json


class DatasetsProvider:
    """Dataset provider that ``pretrain`` calls on every rank.

    Args:
        args: Megatron's global arguments; ``eval_iters`` and ``consumed_valid_samples`` are modified.
    """

    is_distributed = True
    """Tells Megatron that every rank calls the provider; the builder decides which ranks hold data."""

    def __init__(self, args: argparse.Namespace, options: DataOptions):
        self.args, self._options = args, options
        self._unwritable_caches: set[Path] = set()
        self.validation_sha256: str | None = None
        """Hash of the held-out tokens of every evaluation, the same on every rank; None until they are known."""

    def check(self) -> QADDatasetConfig:
        """Check the flags and the files of the data. Returns the configuration of the datasets.

        Raises:
            QADError: see ``__call__``.
        """
        config = dataset_config(self.args, self._options)
        check_data(self.args, prefixes_of(config), self._options)
        return config

    def describe(self, config: QADDatasetConfig, num_samples: int) -> list[str]:
        """Return lines that say how often a job reads its data to train on ``num_samples`` sequences."""
        return [] if self.args.skip_train or self._options.is_ptq else describe_epochs(config, num_samples)

    def __call__(self, train_val_test_num_samples: list[int | None], vp_stage: int | None = None):
        """Build the datasets.

        Args:
            train_val_test_num_samples: number of samples requested of each split; only that of the training split is
                used, because every evaluation reads the same samples.
            vp_stage: virtual pipeline stage of the caller.

        Returns:
            (train, valid, None): datasets, or None if a split has no data or this rank needs none; a test split is not
            evaluated.

        Raises:
            QADError: no data, a prefix that does not exist, data of another tokenizer or vocabulary, or a split in
                which no token counts.
        """
        args, options = self.args, self._options
        is_first = vp_stage in (None, 0)
        config = self.check() if is_first else dataset_config(args, options)
        config.unwritable_caches = self._unwritable_caches
        config.decodes_images = is_first and mpu.get_pipeline_model_parallel_rank() == 0
        num_train = train_val_test_num_samples[0]
        lines = [*notes(config.blend, config.blend_per_split), *self.describe(config, num_train)] if is_first else []
        for line in lines:
            print_rank_0(f"megatron_qad: {line}")
        print_rank_0("megatron_qad: building the training and validation datasets")
        # Calibration reads ahead, possibly more than a short job trains on; a blend has only the requested samples.
        num_train = max(num_train, options.calibration_samples + args.micro_batch_size * args.data_parallel_size)
        is_built = partial(_is_built_on_rank, vp_stage)
        train, _, _ = QADBlendBuilder(
            QADDataset, [num_train, 0, 0], is_built, config_for_split(config, Split.train)
        ).build()
        if not args.skip_train:
            _check_has_counted_tokens(train, Split.train, config)
        valid = _validation_set(args, options.eval_iters, config, is_built) if args.eval_iters else None
        if vp_stage in (None, 0) and args.eval_iters:
            self.validation_sha256 = on_rank_0(lambda: valid.sha256())  # it has data: it is in the first stage
        if valid is not None and vp_stage in (None, 0):
            print_rank_0(
                f"megatron_qad: every evaluation reads {valid.describe()} of {args.seq_length} tokens, always the same "
                f"samples (--eval-iters {args.eval_iters})"
            )
        # Megatron would evaluate a test split after the last validation and report it as the validation.
        return train, valid, None


def _validation_set(
    args: argparse.Namespace, eval_iters: int | None, config: QADDatasetConfig, is_built: Callable[[], bool]
) -> ValidationSet | None:
    """Build the validation set. Sets ``args.eval_iters`` on every rank to the number of iterations that reads it once,
    and resets Megatron's position in it."""
    per_iteration = samples_per_iteration(args)
    if eval_iters is not None:
        limit = eval_iters * per_iteration
    else:
        limit = max(1, DEFAULT_TOKENS // args.seq_length)
    samples = ordered_samples(config, is_built, limit)
    _check_has_counted_tokens(samples, Split.valid, config)
    num_samples = _max_over_ranks(0 if samples is None else min(limit, len(samples)))
    args.consumed_valid_samples = 0
    if num_samples == 0:  # a virtual stage whose ranks read no data
        return None
    needed_iters = -(-num_samples // per_iteration)
    if eval_iters is not None and needed_iters < args.eval_iters:
        print_rank_0(
            f"megatron_qad: --eval-iters {args.eval_iters} becomes {needed_iters}, which reads the whole validation set"
        )
    args.eval_iters = needed_iters
    return None if samples is None else ValidationSet(samples, num_samples, args.eval_iters * per_iteration)


def _check_has_counted_tokens(dataset, split: Split, config: QADDatasetConfig) -> None:
    """Check that some token of a split counts in the loss. Every rank calls this with its dataset of the split."""
    parts = [] if dataset is None else getattr(dataset, "datasets", [dataset])
    # 0: no data on this rank; 1: no token counts; 2: some token counts.
    state = _max_over_ranks(0 if not parts else 1 + any(part.has_counted_tokens() for part in parts))
    if state != 1:
        return
    prefixes, _ = config.blend if config.blend is not None else config.blend_per_split[split.value]
    names, advice = ", ".join(prefixes), "Give other data"
    if config.blend is not None:
        advice = f"Change --split (now {config.split!r}) or give other data"
    if split == Split.valid:
        advice += ", or --eval-iters 0 for no validation"
    raise QADError(
        f"The {split.name} split of {names}: no token counts in the loss: the mask of every label is 0. {advice}."
    )


def _max_over_ranks(value: int) -> int:
    """Return the largest ``value`` of all ranks, so that ranks without data get the result of the others."""
    result = torch.tensor(value, dtype=torch.int64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(result, op=torch.distributed.ReduceOp.MAX)
    return int(result)


def prefixes_of(config: QADDatasetConfig) -> list[str]:
    """Return the prefixes of all blends, each once."""
    blends = [config.blend] if config.blend is not None else config.blend_per_split
    return list(dict.fromkeys(prefix for blend in blends if blend is not None for prefix in blend[0]))


def _shares(split: str | None, blend: Blend | None, blend_per_split: list[Blend | None] | None) -> list[float]:
    """Return the share of each split; 1.0 for a split with data of its own."""
    return [float(part is not None) for part in blend_per_split] if blend is None else parse_split(split)


def dataset_config(args, options: DataOptions) -> QADDatasetConfig:
    """Return the dataset configuration given by Megatron's flags.

    Raises:
        QADError: the flags give no data or request an unsupported kind of data.
    """
    for flag in ("sft", "mock_data"):
        if getattr(args, flag, False):
            raise QADError(
                f"--{flag.replace('_', '-')} is not supported. Prepare the data with megatron-qad prepare (it adds "
                "the loss mask of chat data) and give it with --data-path."
            )
    for flag in ("reset_position_ids", "reset_attention_mask"):
        # Megatron would look for the EOD of its NullTokenizer and build masks that are not used.
        if getattr(args, flag):
            raise QADError(
                f"--{flag.replace('_', '-')} does not separate the documents of a row here. Give "
                "--dataloader-inter-document-masking instead, which separates positions and attention."
            )
    if args.dataloader_type not in (None, "single"):
        raise QADError(
            f"--dataloader-type {args.dataloader_type} would read the validation set in a different order each time. "
            "Omit it; the training data is shuffled anyway."
        )
    blend, blend_per_split = read_blends(args)
    if blend is None and blend_per_split is None:
        raise QADError("No training data was given. Make it with megatron-qad prepare and pass --data-path PREFIX.")
    if args.full_validation or args.multiple_validation_sets:
        raise QADError(
            "--full-validation and --multiple-validation-sets (which needs it) are not supported. Omit them: without "
            "--eval-iters an evaluation reads the whole validation set, up to 2^20 tokens. Give one blend."
        )
    shares = _shares(args.split, blend, blend_per_split)
    if not args.skip_train and not shares[Split.train.value]:
        raise QADError(
            "No training data was given. Give --train-data-path, a training share in --split, or --skip-train to "
            "validate only."
        )
    if args.eval_iters and not shares[Split.valid.value]:
        raise QADError(
            "No validation data was given, so the first evaluation would fail. Give --valid-data-path or a validation "
            "share in --split, or --eval-iters 0 for no validation."
        )
    return QADDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        # Megatron's batch code reads the same flag; attention is causal without a mask as well.
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        sequences_per_dataset=_sequences_per_dataset(args),
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
        inter_document_masking=args.dataloader_inter_document_masking,
        pad_documents_to=options.pad_documents_to,
        vocab_size=options.vocab_size,
        images=options.images,
    )


def _sequences_per_dataset(args) -> dict[str, tuple[int, int]] | None:
    """Return the counts of ``--per-dataset-sequences-path``, so that Megatron need not read each index's header."""
    if args.per_dataset_sequences_path is None:
        return None
    counts = read_json(Path(args.per_dataset_sequences_path))
    for prefix, pair in counts.items():
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n > 0 for n in pair)):
            raise QADError(
                f"--per-dataset-sequences-path {args.per_dataset_sequences_path}: {prefix!r} has the value {pair!r}. "
                "Expected its numbers of sequences and documents, as Megatron's build_sequences_per_dataset.py writes."
            )
    return counts


def _is_built_on_rank(vp_stage: int | None) -> bool:
    """Whether this rank reads data: tensor-parallel rank 0 of the first (tokens) and last (labels) pipeline stage."""
    return mpu.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(vp_stage)
