"""The segments of a run: where it was resumed with other options, and which.

A resumed run goes on with what it was trained with. Its length may change, and the rate and decay of its optimiser, for
these are what a run is prolonged for; the manifest keeps each such change with its step, so that the run can be
replayed. Whatever is no result (`config_hash`) may change unseen.
"""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from fmlightning.runs.config_hash import result_parts

Changes = dict[str, list[Any]]
"""Options with their values before and after."""

MAY_CHANGE = (
    "trainer.max_steps",
    "trainer.max_epochs",
    "trainer.max_time",
    "model.optimizer.lr",
    "model.optimizer.weight_decay",
)


def changed_options(then: dict[str, Any], now: dict[str, Any]) -> Changes:
    """The options of training in which two resolved configs differ.

    An option that only one version of a class has is none of them.
    """
    return {name: list(pair) for name, *pair in differences(result_parts(then), result_parts(now))}


def differences(then: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Options below a name with their two values; an object of another class is one option."""
    both_objects = isinstance(then, dict) and isinstance(now, dict)
    if not both_objects or then.get("class_path") != now.get("class_path"):
        if then != now:
            yield name, then, now
        return
    of_class = "class_path" in then
    for key in dict.fromkeys([*then, *now]):
        inner = name if key == "init_args" else f"{name}.{key}".lstrip(".")
        if key in then and key in now:
            yield from differences(then[key], now[key], inner)
        elif not (of_class or name.endswith("init_args") or key == "init_args"):
            known = then if key in then else now
            if known[key] not in (None, False, [], {}) and name in ("", "trainer"):
                yield inner, then.get(key), now.get(key)


def require_resumable(folder: Path, step: int, changes: Changes) -> None:
    """Refuse to go on with other options than those trained with.

    Raises:
        ValueError: an option changed that may not.
    """
    refused = [
        f"{n} was {said(a)} and is {said(b)}"
        for n, (a, b) in changes.items()
        if n not in MAY_CHANGE
    ]
    if refused:
        raise ValueError(
            f"{folder} was trained to step {step} with other options, and a resumed run keeps them: "
            f"{'; '.join(refused)}. Set them back, as --config {folder / 'config.yaml'} does, or train another run: "
            f"--run_dir DIR without --ckpt_path. Only {', '.join(MAY_CHANGE)} may change, and what is no result"
        )


def said(value: Any) -> str:
    """A value in a message: an object by its class."""
    if isinstance(value, dict) and "class_path" in value:
        arguments = ", ".join(f"{k}={said(v)}" for k, v in (value.get("init_args") or {}).items())
        return f"{str(value['class_path']).rsplit('.', 1)[-1]}({arguments})"
    return "null" if value is None else str(value)


def segments(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The segments of a run by its manifest: `step` and `changes` of each, the first from step 0."""
    return [{"step": 0, "changes": {}}, *(manifest.get("segments") or [])]


def config_before(config: dict[str, Any], later: list[dict[str, Any]]) -> dict[str, Any]:
    """A config as it was before some of its last segments."""
    found = deepcopy(config)
    for segment in reversed(later):
        for name, (before, _) in segment["changes"].items():
            put(found, name, before)
    return found


def put(config: dict[str, Any], name: str, value: Any) -> None:
    """Set an option of `MAY_CHANGE`."""
    *path, last = name.split(".")
    for key in path:
        config = config[key]
    (config.get("init_args") or config)[last] = value


def option(config: dict[str, Any], name: str) -> Any:
    """The value of an option of `MAY_CHANGE`."""
    *path, last = name.split(".")
    for key in path:
        config = config[key]
    return (config.get("init_args") or config)[last]


def in_words(manifest: dict[str, Any]) -> str:
    """The changes of a run, for people: "step 200: trainer.max_steps 200 -> 400"."""
    return "; ".join(
        f"step {part['step']}: "
        + ", ".join(f"{name} {said(a)} -> {said(b)}" for name, (a, b) in part["changes"].items())
        for part in segments(manifest)[1:]
    )
