"""Which errors are the user's, and how they read."""


def is_users(error: Exception) -> bool:
    """Whether an error is about what was asked for, and so needs a message and not a traceback."""
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
    return (
        f"{error.strerror}: {error.filename}"
        if isinstance(error, OSError) and error.filename
        else str(error)
    )
