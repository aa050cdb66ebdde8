"""Errors that are the user's, and their messages."""


def is_users(error: Exception) -> bool:
    """Decide whether an error is about what was requested, and so needs a message and not a traceback."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return out_of_memory(error) or bool(
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


def out_of_memory(error: BaseException) -> bool:
    """Decide whether a processor or an accelerator has no more memory; torch says the former by its words alone."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & {"OutOfMemoryError", "MemoryError"}) or "can't allocate memory" in str(
        error
    )


def message(error: Exception) -> str:
    """The one line of an error; a file's with its name."""
    if out_of_memory(error):
        words = str(error).rpartition("DefaultCPUAllocator: ")[2].partition("\n")[0].rstrip(".")
        return (
            f"out of memory: {words or 'no more is there'}. Take a smaller batch, data.batch_size in fit and "
            "--batch_size elsewhere: fmlightning find_batch_size finds the largest that fits"
        )
    return (
        f"{error.strerror}: {error.filename}"
        if isinstance(error, OSError) and error.filename
        else str(error)
    )
