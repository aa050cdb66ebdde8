"""A config as flat options, what differs between several, and what a value is called.

A class is the value of its option, and its arguments are options below it:

    model: {path: {class_path: ...Linear, init_args: {sigma_min: 0.1}}}
    model.path = Linear, model.path.sigma_min = 0.1
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Value = str | int | float | bool | None
Options = dict[str, Value]

ABSENT = "-"
"""The value of an option that a config does not have."""


def flat(config: Any, name: str = "") -> Iterator[tuple[str, Value]]:
    """The options of a config, or of a part of it, by dotted name."""
    if isinstance(config, dict) and "class_path" in config:
        yield name, str(config["class_path"]).rsplit(".", 1)[-1]
        config = config.get("init_args") or {}
    if isinstance(config, dict):
        for key, part in config.items():
            yield from flat(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, short(config) if isinstance(config, list) else config


def short(component: Any) -> str:
    """A class and its options from a config, without the path of its module."""
    if isinstance(component, list):
        return f"[{', '.join(map(short, component))}]"
    if not isinstance(component, dict) or "class_path" not in component:
        return str(component)
    arguments = component.get("init_args") or {}
    inner = ", ".join(f"{k}={short(v)}" for k, v in arguments.items() if v is not None)
    return f"{component['class_path'].rsplit('.', 1)[-1]}({inner})"


def differing_options(configs: Sequence[Options], below: str = "") -> list[str]:
    """All options whose values are not the same everywhere."""
    names = dict.fromkeys(name for config in configs for name in config if name.startswith(below))
    return [n for n in names if len({json.dumps(c.get(n, ABSENT)) for c in configs}) > 1]


def differing(configs: Sequence[Options]) -> list[str]:
    """The options that differ, without the arguments of a class that differs itself."""
    odd = differing_options(configs)
    return [n for n in odd if not any(n.startswith(f"{above}.") for above in odd)]


@dataclass(frozen=True)
class Labels:
    """Names of the values of one option: a class with those arguments in which its instances differ."""

    option: str
    arguments: dict[Value, list[str]]

    @classmethod
    def of(cls, option: str, configs: Sequence[Options]) -> "Labels":
        below, peers = f"{option}.", {}  # type: tuple[str, dict[Value, list[Options]]]
        for config in configs:
            peers.setdefault(config.get(option, ABSENT), []).append(config)
        arguments = {own: differing_options(group, below) for own, group in peers.items()}
        return cls(option, arguments)

    def __call__(self, config: Options) -> Value:
        own, below = config.get(self.option, ABSENT), f"{self.option}."
        names = self.arguments.get(own, []) if self.option in config else config
        there = [n for n in names if n.startswith(below) and n in config]
        inner = [f"{n.removeprefix(below)}={config[n]}" for n in there]
        return f"{'' if own == ABSENT else own}({', '.join(inner)})" if inner else own


def split(text: str) -> Iterator[str]:
    """The parts between commas, of which brackets keep theirs."""
    depth, start = 0, 0
    for place, sign in enumerate(f"{text},"):
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0:
            yield text[start:place].strip()
            start = place + 1


def called(value: Value) -> str:
    """A value as it is written."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def same(text: str, value: Value) -> bool:
    """Compare typed text with a value: by its number, or its name."""
    try:
        return float(text) == float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return text.strip().lower() in (str(value).lower(), "null" if value is None else "")
