"""Flow matching experiments that can be proved, replayed and compared."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

__version__ = version("fmlightning")
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from fmlightning.cli.load import load


def __getattr__(name: str) -> Any:
    # imported on use: commands that need no model start without torch
    if name == "load":
        from fmlightning.cli.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
