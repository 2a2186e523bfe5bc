"""Jobs of test_log.py, with callbacks that print, warn and fail inside other packages."""

import warnings

from training_jobs import train

from megatron_qad.engine.events import Callback


class _Speaks(Callback):
    """A user's callback that prints and warns."""

    def step_begins(self, step, model):
        if step == 1:
            print("the callback prints")
            warnings.warn("the callback warns", stacklevel=1)


class _Breaks(Callback):
    """Fails in code of torch, as a bug would."""

    def step_begins(self, step, model):
        import torch

        if step == 2:
            torch.nn.functional.linear(torch.zeros(2), torch.zeros(3))


class _Documents(Callback):
    """Prints the sums of the lengths of this rank's documents, and of their squares."""

    def forward_begins(self, batches, is_training):
        if is_training:
            lengths = [length for batch in batches for length in batch.documents.document_lengths]
            print("documents", sum(lengths), sum(length**2 for length in lengths))


def count_documents(argv: list[str]) -> None:
    train(argv, callbacks=[_Documents()])


def speak(argv: list[str]) -> None:
    warnings.simplefilter("default", UserWarning)  # the server's environment ignores all warnings
    train(argv, callbacks=[_Speaks()])


def fail(argv: list[str]) -> None:
    train(argv, callbacks=[_Breaks()])
