"""The one error that a user is meant to read."""


class QADError(RuntimeError):
    """A problem in what the user gave: names the thing, what was found, what was expected, and the next step.

    Entry points print it without a traceback and exit with status 1; everything else that is raised is a bug of ours.
    """
