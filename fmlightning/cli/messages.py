"""An error of a class about its arguments, under the names that they have as options."""

import re
from collections.abc import Iterator, Sequence
from typing import Any


def leaves(config: Any, option: str = "") -> Iterator[tuple[str, Any]]:
    """Every option of a resolved config by its name on the command line, with its value."""
    if isinstance(config, dict):
        for key, value in config.items():
            name = option if key in ("init_args", "dict_kwargs") else f"{option}.{key}".strip(".")
            yield from leaves(value, name)
    elif isinstance(config, list) and any(isinstance(value, dict) for value in config):
        for value in config:
            yield from leaves(value, option)
    else:
        yield option, config


def located(message: str, config: dict[str, Any], built: Sequence[str] = ()) -> str:
    """An error of a class about its arguments, by the names that they have as options.

    Args:
        config: the resolved config.
        built: the import paths of the objects that were at work, the innermost first.
    """
    if message.startswith("Does not validate against"):  # any of several types: the first says most
        message = " ".join(message.partition("\n  - ")[2].partition("\n  - ")[0].split()) or message
    options = list(leaves(config))
    if any(
        "." in name and re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", message)
        for name, _ in options
    ):
        return message
    for found in re.finditer(r"(?<![\w.])([a-zA-Z_]\w*)=", message):
        rest = message[found.end() :]
        names = [n for n, v in options if n.endswith(f".{found[1]}") and starts_with(rest, v)]
        if len(names) == 1:
            return message[: found.start()] + names[0] + message[found.end(1) :]
    for path in built:
        name = path.rsplit(".", 1)[-1]
        names = [
            n.removesuffix(".class_path")
            for n, v in options
            if n.endswith("class_path") and same(v, path)
        ]
        if len(names) == 1:
            return f"{names[0]}={name}: {message.removeprefix(name).removeprefix(':').strip()}"
    return message


def same(short: Any, path: str) -> bool:
    """Compare two import paths of a class, which a package may offer under a shorter one."""
    a, b = str(short).split("."), path.split(".")
    return (a[0], a[-1]) == (b[0], b[-1])


def starts_with(text: str, value: Any) -> bool:
    """Test whether a text begins with a value, as Python shows it."""
    shown = {str(value), repr(value), str(float(value)) if type(value) is int else ""} - {""}
    if isinstance(value, list):
        shown.add(str(tuple(value)))
    return any(re.match(rf"{re.escape(words)}(?![\w.])(?!\.\d)", text) for words in shown)


def at_work(error: BaseException) -> list[str]:
    """The import paths of the objects whose methods an error came through, the innermost first."""
    paths, step = [], error.__traceback__
    while step is not None:
        self = step.tb_frame.f_locals.get("self")
        paths.append(f"{type(self).__module__}.{type(self).__qualname__}")
        step = step.tb_next
    return list(dict.fromkeys(reversed(paths)))
