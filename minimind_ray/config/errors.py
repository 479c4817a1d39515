"""The exception for errors that the user can correct."""


class UserError(ValueError):
    """Its message is a sentence: what is wrong, where (file and line, or config key), and what to do.

    The command line prints only the message, without a traceback.
    """
