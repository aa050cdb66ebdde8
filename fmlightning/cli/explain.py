"""One line for an error of the parser: the whole name of the option, the value, and what it should be.

jsonargparse explains over many lines, for each type that an option may have, why the value is not of it, and names only
the last part of the option. From its words only the option and the value are read; what the value must be is read from
the type of the option.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import torch
from torch import nn

from fmlightning.cli.allowed import REFUSED
from fmlightning.cli.jsonargparse_internals import all_actions, type_of
from fmlightning.metrics.metric import FlowMetric
from fmlightning.runs.legacy import ARGUMENTS, CLASSES, renamed

UNKNOWN = "unknown option"
KEY = re.compile(r'\s*Parser key "([^"]+)":\s*')
NO_SUCH = re.compile(
    r"nrecognized arguments: ([^\s=]+)|does not accept option '([^']+)'|Option '([^']+)' is not accepted"
)
INSIDE = re.compile(r"(?<!\S)--(\w\S*:? .*)")
"""The line of an option inside of a class, which this module has written."""

CLASS = re.compile(
    r"(?:import path string: |Import path |class_path '|instantiatable class, but |class: Expected ')([^\s']+)"
)
VALUE = re.compile(
    r"(?:Given|Got) value: (?:NestedArg\(key='\w+', val=(.*)\)|(.*))$|Not of type \w+: (?:(\S+) does|.*: '([^']*)'$)",
    re.MULTILINE,
)
LONGEST = 80

WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "a mapping such as {name: value}",
    "Seed": f"a whole number from 0 to {2**32 - 1}",
    "timedelta": "a time such as 0:30:00",
}


def explain(message: str, parser: Any) -> str:
    """An error of a parser, in one line."""
    message = re.sub(r"(?<=[ ,])(fit|validate|test|predict)\.(?=\w)", "--", message)
    if missing := re.match(r"the following arguments are required: ([^,\s]+)", message):
        if not parser.exit_on_error:  # the parser of a class
            return f"--{missing[1]}: must be given"
        configs = any(a.dest == "config" for a in all_actions(parser))
        remedy = (
            "a config gives them: --config configs/toy/moons.yaml" if configs else "--help explains"
        )
        return f"{message}; {remedy}"
    if found := NO_SUCH.search(message):
        words, option, argument = found.groups()
        return (
            no_such_argument(argument, parser)
            if argument
            else no_such_option(words or option, parser)
        )
    if key := KEY.match(message):
        return wrong_value(key[1], message[key.end() :], parser)
    return " ".join(message.split())


def no_such_option(word: str, parser: Any) -> str:
    """An unknown option, and the one that it was renamed to or that is closest."""
    name = word.removeprefix("--")
    if new := renamed(name):
        return f"{UNKNOWN} {word}: it is now --{new}"
    known = [o for action in all_actions(parser) for o in action.option_strings]
    close = get_close_matches(f"--{name}", known, n=1, cutoff=0.5)
    return f"{UNKNOWN} {word}; " + (f"did you mean {close[0]}?" if close else "--help lists them")


def no_such_argument(name: str, parser: Any) -> str:
    """An unknown argument of a class, whose parser this is."""
    known = {o for action in all_actions(parser) for o in action.option_strings}
    new = [names[name] for names in ARGUMENTS.values() if f"--{names.get(name)}" in known]
    return f"--{name}: {UNKNOWN}" + (f", it is now {new[0]}" if new else "")


def wrong_value(option: str, body: str, parser: Any) -> str:
    """A value that an option cannot have."""
    if refusal := re.search(rf"([\w.]+ )?({REFUSED}.*)", body):
        path = (
            refusal[1] or f"{value_in(body)} "
        )  # jsonargparse takes the value out of what it quotes
        return f"--{option}: {path}{refusal[2]}"
    if section := re.search(r"Unable to load config ['\"](.*?)['\"]", body):
        return wrong_section(option, section[1], body, parser)
    if inside := INSIDE.search(
        body
    ):  # the value is of the right kind, and something in it is wrong
        words = f"--{option}.{inside[1]}"
        group = words.partition(f": {UNKNOWN}")[0].rpartition(".")[0]
        help_ = f"; {group}.help CLASS lists those that a class has"
        return words + (help_ if words.endswith(UNKNOWN) else "")
    kind = next((type_of(a) for a in all_actions(parser) if a.dest == option), None)
    known, wanted, value = known_classes(kind), in_words(kind), value_in(body)
    named = CLASS.search(body)
    if named or "Not a valid subclass" in body:
        name = named[1] if named else value
        if known or not wanted:
            return wrong_class(option, clipped(name), body, known)
    must = f"must be {wanted}" if wanted else " ".join(body.split())
    return f"--{option}{' ' + clipped(value) if value else ''}: {must}"


def wrong_section(option: str, value: str, body: str, parser: Any) -> str:
    """A group of options that is given one value: a file in which something is wrong, or what no group can be."""
    inside = body[body.find("- Parser key") + 2 :]
    if "Unable to load config" in inside:
        return f"--{option} {value}: has options of its own, so set those: --{option}.NAME VALUE"
    return f"{explain(inside, parser)} (in {value})"


def wrong_class(option: str, name: str, body: str, known: list[str]) -> str:
    """An option that takes a class, and a name that is none of its kind."""
    kind = re.search(r"subclass of (?:<class ')?(\w+)", body)
    if name.startswith("{"):
        why = "a class is given by class_path and init_args, and by nothing else"
    elif " is abstract" in body:
        why = "is abstract"
    else:
        why = f"is no {kind[1]}" if kind and "path string: " not in body else "no such class"
    short = name.rsplit(".", 1)[-1]
    short = CLASSES.get(short, short)
    close = get_close_matches(short, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    choice = f"Known: {', '.join(known)}, or a full import path" if known else "Give an import path"
    return f"--{option} {name}: {why}; {hint}{choice}"


def value_in(body: str) -> str:
    """The value that was given, if the message shows it as a user would write it."""
    found = VALUE.search(body)
    value = next(filter(None, found.groups()), "") if found else ""
    return "" if value.startswith("Namespace(") else value


def clipped(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def members(kind: Any) -> tuple[Any, ...]:
    """The types of a union, without that of null."""
    union = get_origin(kind) in (Union, UnionType)
    return tuple(each for each in (get_args(kind) if union else (kind,)) if each is not NoneType)


def in_words(kind: Any) -> str:
    """The simple types and values that an option may have."""
    choices = [str(c) if isinstance(c, int) else repr(c) for each in members(kind)
               if get_origin(each) is Literal for c in get_args(each)]  # fmt: skip
    if choices:  # a type beside the choices is that of other choices
        return f"one of {', '.join(dict.fromkeys(choices))}"
    words = [word for each in members(kind) if (word := in_word(each))]
    if WORDS[float] in words:
        words = [word for word in words if word != WORDS[int]]
    return " or ".join(dict.fromkeys(words))


def in_word(kind: Any) -> str:
    """A simple type; nothing for a class."""
    name = getattr(kind, "__name__", "")
    if isinstance(kind, type) and (kind in WORDS or name in WORDS):
        return WORDS[kind if kind in WORDS else name]
    for start, bound in {"Positive": "above 0", "NonNegative": "from 0 on"}.items():
        if name.startswith(start):
            return f"{WORDS[int] if name.endswith('Int') else WORDS[float]} {bound}"
    origin, inner = get_origin(kind), get_args(kind)
    if origin is tuple and Ellipsis not in inner:
        return f"a list of {len(inner)} values"
    iterable = isinstance(origin, type) and issubclass(origin, list | tuple | set)
    return "a list such as [a, b]" if iterable else WORDS[dict] if origin is dict else ""


def known_classes(kind: Any) -> list[str]:
    """The names of the classes that an option may be, of those worth naming."""
    kinds = list(classes(kind))
    found = {c for each in kinds for c in subclasses(each) if ours(c)}
    found -= {torch.optim.Optimizer, torch.optim.SparseAdam}
    if FlowMetric not in kinds:  # metrics are modules, and no networks
        found = {c for c in found if not issubclass(c, FlowMetric)}
    return sorted(c.__name__ for c in found)


def classes(kind: Any) -> Iterator[type]:
    """The classes that a type hint names."""
    inner = get_args(kind)
    # what a function takes is no choice
    for each in inner[-1:] if get_origin(kind) is Callable else inner:
        yield from classes(each)
    if isinstance(kind, type) and not inner and kind.__module__ != "builtins":
        yield kind


def subclasses(kind: type) -> Iterator[type]:
    """A class and all below it."""
    yield kind
    below: list[type] = kind.__subclasses__()
    for each in below:
        yield from subclasses(each)


def ours(kind: type) -> bool:
    """Test whether a class can be built and is worth naming."""
    if issubclass(kind, nn.Module) and not issubclass(
        kind, FlowMetric
    ):  # of all modules, the networks
        inside = kind.__module__.startswith("fmlightning.nets.")
        return inside and {"x", "t", "y"} <= inspect.signature(kind.forward).parameters.keys()
    named = kind.__module__.startswith(("fmlightning.", "torch.optim."))
    return named and not inspect.isabstract(kind) and not kind.__name__.startswith("_")
