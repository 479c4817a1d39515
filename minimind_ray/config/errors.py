"""The one kind of error that is the user's to mend."""


class UserError(ValueError):
    """One sentence: what is wrong, where (file and line, or config key), and what to do. The CLI prints it alone."""
