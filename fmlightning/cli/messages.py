"""One line for a wrong value: the whole name of the option, the value, and what it should be.

jsonargparse says over many lines, for each type that an option may have, why the value is not of it, and names only
the last part of the option; a class says of its own argument what it must be, and does not know whose option it is.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from fmlightning.cli.allowed import REFUSED

KEY = re.compile(r'\s*Parser key "([^"]+)":\s*')
BOILERPLATE = re.compile(r"Subclass types expect one of:(\s*- a (class|dict)[^\n]*)+")
OTHER_LINES = ("Subtypes:", "Errors:", "Given value")
OTHER_WAYS = (
    "Expected a path but",
    "Does not validate against",
    "Unable to load config",
    "Expected a <class 'NoneType'>",
)
LONGEST = 80

TYPES = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'str'>": "text",
    "<class 'bool'>": "true or false",
    "<class 'list'>": "a list such as [a, b]",
    "<class 'tuple'>": "a list such as [a, b]",
    "<class 'dict'>": "a mapping such as {name: value}",
}
CLASS_ERRORS = (
    r"Expected a dot import path string: (?P<name>\S+)",
    r"Expected an instantiatable class, but (?P<name>\S+) is (?P<why>\w+)",
    r"Import path (?P<name>\S+) does not correspond to a (?P<why>subclass of \w+)",
    r"Not a valid (?P<why>subclass of \w+)(\. Got value: (?P<name>.*))?",
    r"Problem with given class_path '(?P<name>[^']+)':\s*(?P<why>.*)",
    r"Type .* expects a function or a callable class: Expected '(?P<name>[^']+)' to be a (?P<why>.*?)\.\. Got.*",
    r"Type .* expects a function or a callable class: (?P<why>.*?)\. Got value: (?P<name>.*)",
)


def plain(message: str, known: Callable[[str], Sequence[str]]) -> str:
    """What a parser says, in one line.

    Args:
        known: the names of the classes that an option may be.
    """
    refusal = re.search(rf"[\w.]+ {REFUSED}.*", message)
    key = KEY.match(message)
    if key is None:
        return " ".join(message.split())
    option, body = key[1], message[key.end() :]
    found = list(complaints(body))
    if section := re.search(r"Unable to load config ['\"](.*?)['\"]", body):
        return of_section(option, section[1], body, known)
    inside = next((c for c in found if c.startswith("--")), None)
    if inside:  # the value is of the right kind, and something in it is wrong
        return f"--{option}.{inside[2:]}"
    if refusal:
        return f"--{option}: {refusal[0]}"
    kinds = expected(found)
    wrong = class_error(found)
    if wrong and (known(option) or not kinds):
        return of_class(option, *wrong, known(option))
    shown = value_of(body)
    return f"--{option}{' ' + shown if shown else ''}: " + (
        kinds or "; ".join(dict.fromkeys(found))
    )


def of_section(option: str, value: str, body: str, known: Callable[[str], Sequence[str]]) -> str:
    """A group of options that is given one value: a file where something is wrong, or what no group can be."""
    inside = body[body.find("- Parser key") + 2 :]
    if "Unable to load config" in inside:
        return f"--{option} {value}: has options of its own, so set those: --{option}.NAME VALUE"
    return f"{plain(inside, known)} (in {value})"


def complaints(body: str) -> Iterator[str]:
    """What is said for each type, in one line each."""
    open_item = ""
    for line in (*BOILERPLATE.sub("", body).splitlines(), "- "):
        text = line.strip()
        starts = text.startswith("-") and not text.startswith("--")
        if starts or not text or text.startswith(OTHER_LINES):
            if open_item and not open_item.startswith(OTHER_WAYS):
                yield open_item
            open_item = text[1:].strip() if starts else ""
        else:
            open_item = f"{open_item} {text}".strip()


def expected(found: Sequence[str]) -> str:
    """The simple types and values that an option may have, in words."""
    words: list[str] = []
    choices: list[str] = []
    for text in found:
        kind = re.match(r"Expected an? (<class '\w+'>)", text)
        words += [TYPES[kind[1]]] if kind and kind[1] in TYPES else []
        literal = re.match(r"Expected a typing.Literal\[(.*?)\](\.|$)", text)
        choices += literal[1].split(", ") if literal else []
        bound = re.match(r"Not of type (\w+):", text)
        words += [restriction(bound[1])] if bound else []
        size = re.match(r"Expected a tuple with (\d+) elements", text)
        words += [f"a list of {size[1]} values"] if size else []
    if choices:  # a type beside the choices is that of other choices
        words = [f"one of {', '.join(dict.fromkeys(choices))}"]
    if "a number" in words:
        words = [w for w in words if w != "a whole number"]
    return f"must be {' or '.join(dict.fromkeys(words))}" if words else ""


def restriction(name: str) -> str:
    """jsonargparse's name of a restricted type, in words."""
    named = {"Seed": f"a whole number from 0 to {2**32 - 1}", "timedelta": "a time such as 0:30:00"}
    if name in named:
        return named[name]
    sign = {"Positive": "above 0", "NonNegative": "from 0 on"}
    kind = "a whole number" if name.endswith("Int") else "a number"
    return next(
        (f"{kind} {words}" for start, words in sign.items() if name.startswith(start)), name
    )


def class_error(found: Sequence[str]) -> tuple[str, str] | None:
    """The name that is no class of the right kind, and why."""
    for pattern in CLASS_ERRORS:
        for text in found:
            if match := re.match(pattern, text):
                parts = match.groupdict()
                return clipped(parts.get("name") or ""), parts.get("why") or ""
    return None


def of_class(option: str, name: str, why: str, known: Sequence[str]) -> str:
    """An option that takes a class, and the name that is none."""
    kind = re.match(r"subclass of (?:<class ')?(\w+)", why)
    if name.startswith("{"):
        why = "a class is given by class_path and init_args, and by nothing else"
    elif kind:
        why = f"is no {kind[1]}"
    elif why in ("abstract", "a"):
        why = "is abstract"
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    choice = f"Known: {', '.join(known)}, or a full import path" if known else "Give an import path"
    return f"--{option} {name}: {why or 'no such class'}; {hint}{choice}"


def value_of(body: str) -> str:
    """The value that was given, if it is shown as a user would write it."""
    found = re.search(r"(?:Given|Got) value: ([^\n]*)\s*$", body)
    inside = re.match(r"NestedArg\(key='\w+', val=(.*)\)$", found[1]) if found else None
    value = inside[1] if inside else found[1] if found else ""
    refused = re.search(r"Not of type \w+: (?:(\S+) does|.*: '?([^']*)'?$)", body, re.MULTILINE)
    value = value or (refused[1] or refused[2] if refused else "")
    return "" if value.startswith("Namespace(") else clipped(value)


def clipped(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


# -- of classes ---------------------------------------------------------------------------------------


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
    """What a class says of its arguments, by the names that they have as options.

    Args:
        config: the resolved config.
        built: the import paths of the objects that were at work, the innermost first.
    """
    if message.startswith("Does not validate against"):
        message = next(complaints(message), message)
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
    """Whether two import paths name one class, which a package may offer under a shorter one."""
    a, b = str(short).split("."), path.split(".")
    return (a[0], a[-1]) == (b[0], b[-1])


def starts_with(text: str, value: Any) -> bool:
    """Whether a text begins with a value, as Python shows it."""
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
