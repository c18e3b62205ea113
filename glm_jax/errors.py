"""The one exception for a user's mistakes."""


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and how to fix it.

    The command line prints the message after ``error: `` and exits with code 2, without a traceback.
    """


class WorkFailed(Exception):
    """The work itself failed and said why in one line, as a run whose loss is no longer finite; exit code 4."""
