"""The classes that a config may name.

A config is text that may come from anywhere, and to import a module is to run it. So a class path is checked as text
before anything is imported: it begins with one of `PACKAGES`, or with a module that the command line named with
`--allow my_package`; a config cannot allow itself. What is then found there must be a class, defined in such a
module: a function is never called, and `torch.os.system` is not torch's.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

PACKAGES = ("fmlightning", "torch", "torchvision", "lightning")
MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
REFUSED = "is not imported"
"""By these words a refusal is found again in what a parser makes of it."""

named: ContextVar[tuple[str, ...]] = ContextVar("named", default=())


@contextmanager
def allowing(modules: Sequence[str]) -> Iterator[None]:
    """Allow modules beside `PACKAGES`.

    Raises:
        ValueError: a name is not that of a module.
    """
    for module in modules:
        if not MODULE.fullmatch(module):
            raise ValueError(f"--allow {module!r} is no module: name it as in `import my_package`")
    token = named.set((*named.get(), *modules))
    try:
        yield
    finally:
        named.reset(token)


def require_allowed(path: str) -> None:
    """Refuse an import path by its text alone.

    Raises:
        ValueError: it does not begin with a package that is allowed.
    """
    if any(f"{path}.".startswith(f"{module}.") for module in (*PACKAGES, *named.get())):
        return
    top = path.split(".")[0]
    raise ValueError(
        f"{path} {REFUSED}: a config may name classes of {', '.join(PACKAGES)} and of modules that the command line "
        f"allows. If you trust {top}, which will run: --allow {top} (in Python: allow=[{top!r}])"
    )


def require_class(path: str, found: Any) -> None:
    """Refuse what is no class, or a class of another package that an allowed module has imported.

    jsonargparse has a list of allowed paths too. It knows the path and not what is found there, so that it calls a
    function of an allowed package; and it is one for the whole process.

    Raises:
        ValueError: building it would run something else than the path says.
    """
    if inspect.isclass(found):
        require_allowed(f"{found.__module__}.{found.__qualname__}")
    elif callable(found) or inspect.ismodule(found):
        raise ValueError(f"{path} {REFUSED}: it is no class but a {type(found).__name__}")


def guarded(import_object: Callable[..., Any]) -> Callable[..., Any]:
    """A function that imports what a path names, with the checks before and after it."""

    @wraps(import_object)
    def checked(path: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(path, str) and "." in path:
            require_allowed(path)
        found = import_object(path, *args, **kwargs)
        require_class(path, found)
        return found

    return checked
