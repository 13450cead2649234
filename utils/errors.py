"""Errors that are a user's to mend: shown as one message, without a traceback."""


class UserError(Exception):
    """A wrong setting or input. The message says what was expected and what helps."""


class DataError(UserError):
    """A data file or folder that is missing or not what was expected. The message names it."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read or does not fit. The message names the file."""
