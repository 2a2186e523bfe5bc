"""The error class for problems that a user can fix."""


class QADError(RuntimeError):
    """A problem in the user's input: names the thing, what was found, what was expected, and the next step.

    Entry points print it without a traceback and exit with status 1. Any other exception is a bug in megatron_qad.
    """
