"""Errors that are the user's, and their messages."""


def is_users(error: Exception) -> bool:
    """Decide whether an error is about what was requested, and so needs a message and not a traceback."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(
        names
        & {
            "ValueError",
            "OSError",
            "MisconfigurationException",
            "SolverError",
            "NonFiniteError",
            "YAMLError",
        }
    )


def message(error: Exception) -> str:
    """The one line of an error; a file's with its name."""
    return (
        f"{error.strerror}: {error.filename}"
        if isinstance(error, OSError) and error.filename
        else str(error)
    )
