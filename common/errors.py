"""The one exception that is the user's to mend: the CLI prints its message as one line and exits with 2."""


class TriModeError(Exception):
    """What is wrong, where (file, field, value), and the remedy, in one line."""
