"""The exception for errors that the user can correct."""


class UserError(ValueError):
    """An error that the user can correct. The message names the problem, its place (file and line, or config key), and
    the remedy.

    The command line prints only the message, without a traceback.
    """
