"""Every private name of jsonargparse that this package uses, in one place.

pyproject.toml pins the versions that have them; tests/cli/test_jsonargparse.py says what each must do.
"""

from collections.abc import Callable, Iterator
from typing import Any

from jsonargparse import Namespace, _actions, _typehints
from jsonargparse._common import parser_context

Import = Callable[..., Any]


def guard_imports(guarded: Callable[[Import], Import]) -> None:
    """Wrap the function that imports what a value names; every import path of a value goes through these two."""
    for module in (_typehints, _actions):
        module.import_object = guarded(module.import_object)  # type: ignore[attr-defined]


def forget_on_change(package: str) -> None:
    """Let a class of a package that takes another's place start from its own defaults.

    jsonargparse carries over the arguments that have the same name.
    """
    kept = _typehints.discard_init_args_on_class_path_change

    def change(parser: Any, prev_val: Any, value: Any) -> None:
        changes = prev_val and prev_val["class_path"] != value["class_path"]
        if changes and str(prev_val["class_path"]).startswith(f"{package}."):
            prev_val["init_args"] = Namespace()
        kept(parser, prev_val, value)

    _typehints.discard_init_args_on_class_path_change = change


def all_actions(parser: Any) -> Iterator[Any]:
    """The options of a parser, and those of its subcommands."""
    for action in parser._actions:
        yield action
        for inner in (getattr(action, "_name_parser_map", None) or {}).values():
            yield from inner._actions


def type_of(action: Any) -> Any:
    """The type hint of an option, or None."""
    return getattr(action, "_typehint", None)


def values(parser: Any, options: Namespace) -> Iterator[tuple[str, Any, Any]]:
    """The name, the action and the value of each option that is set, those of classes included."""
    yield from _values(parser, options, parser, "")


def _values(
    parser: Any, options: Namespace, top: Any, start: str
) -> Iterator[tuple[str, Any, Any]]:
    for action in parser._actions:
        value = options.get(action.dest)
        if action.dest in options:
            yield start + action.dest, action, value
        for spec in value if isinstance(value, list) else [value]:
            if isinstance(spec, Namespace) and spec.get("class_path") and spec.get("init_args"):
                with parser_context(parent_parser=top):
                    inner = _typehints.ActionTypeHint.get_class_parser(spec.class_path)
                yield from _values(inner, spec.init_args, top, f"{start}{action.dest}.")
