"""The one exception for a user's mistakes."""


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and how to fix it.

    The command line prints the message after ``error: `` and exits with code 2, without a traceback.
    """
