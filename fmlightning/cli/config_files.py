"""Config files as text: checked before a class is imported or anything is built."""

from collections.abc import Hashable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from fmlightning.cli.allowed import require_allowed
from fmlightning.runs.directory import Run
from fmlightning.runs.legacy import is_saved, translate

SECTIONS = (
    "model",
    "trainer",
    "ema",
    "samples",
    "trajectories",
    "evaluation",
    "checkpoints",
    "nonfinite",
    "wandb",
)
"""Groups of options."""

CONFIG = ("-c", "--config")
RESUME = ("auto", "last")
"""Values of `--ckpt_path` that mean the run's own newest checkpoint."""

LARGEST = 100_000
"""More values than this are not a config, but aliases of aliases."""


class PlainYAML(yaml.SafeLoader):
    """YAML of plain values, where a key that stands twice is an error rather than lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value} stands twice: remove one",
                    problem_mark=key.start_mark,
                )
            seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        return super().construct_mapping(node, deep)


def given(args: Sequence[str], *options: str) -> Iterator[tuple[int, str]]:
    """The values of an option on a command line, each with the place of the word that holds it."""
    for place, (word, following) in enumerate(pairwise((*args, ""))):
        name, equals, value = word.partition("=")
        if name in options and (equals or place + 1 < len(args)):
            yield (place, value) if equals else (place + 1, following)


def check_files(args: list[str]) -> None:
    """Read every config file once, to name the file and the line where one is wrong.

    Raises:
        ValueError: a file cannot be read, is no config, or names a class that is not allowed.
    """
    for _, name in given(args, *CONFIG):
        try:
            check(read(name))
        except ValueError as error:
            raise ValueError(f"--config {name}: {error}") from error


def translated(args: list[str]) -> list[str]:
    """The arguments, with the content of a config that an earlier version saved in the place of its file.

    Its run, which is resumed where it lies, had another hash.
    """
    words = list(args)
    for place, name in given(args, *CONFIG):
        if not is_saved(Path(name)):
            continue
        before = read(name)
        content = translate(before, name)
        if content == before:
            continue
        if content.get("run_dir") is None and any(
            v in RESUME for _, v in given(args, "--ckpt_path")
        ):
            content["run_dir"] = str(Path(name).parent)
        text = yaml.safe_dump(
            content, default_flow_style=True, sort_keys=False, width=10**9
        ).strip()
        words[place] = f"--config={text}" if args[place].startswith("-") else text
    return words


def read(name: str) -> Any:
    try:
        return yaml.load(Path(name).read_text(encoding="utf-8"), PlainYAML)
    except FileNotFoundError as error:
        raise ValueError("no such file") from error
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError("is not text in UTF-8; is it another kind of file?") from error
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML: {explained(error)}") from error


def explained(error: yaml.YAMLError) -> str:
    """The line in which a file is not YAML, and what to do."""
    problem = str(getattr(error, "problem", None) or error)
    mark = getattr(error, "problem_mark", None)
    cures = {
        r"'\t'": "indent with spaces, not tabs",
        "found another document": "one file holds one config; give the other with a second --config",
        "the tag": "a config holds plain values and no tags",
    }
    cure = next((f"; {words}" for sign, words in cures.items() if sign in problem), "")
    return (f"line {mark.line + 1}: " if mark else "") + " ".join(problem.split()) + cure


def check(content: Any) -> None:
    """Refuse content that no config can have.

    Raises:
        ValueError: what is wrong, by its option.
    """
    if not isinstance(content, dict):
        raise ValueError(
            "holds no options; a config is a mapping such as `trainer: {max_steps: 100}`"
        )
    require_small(content)
    for key, value in content.items():
        if not isinstance(key, str):
            raise ValueError(f"{key!r} is no option: a name must be text")
        if key in SECTIONS and not isinstance(value, dict):
            raise ValueError(
                f"{key}: {value} must be a mapping of options, such as `{key}: {{...}}`"
            )
    for option, spec in class_specs(content):
        check_spec(option, spec)


def require_small(content: Any) -> None:
    """Refuse aliases that expand without end, without expanding them."""
    waiting, count = [content], 0
    while waiting:
        value = waiting.pop()
        count += 1
        if count > LARGEST:
            raise ValueError(
                f"its aliases expand to more than {LARGEST:,} values, or to themselves"
            )
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def class_specs(content: Any, option: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping that names a class, at any depth, with its option."""
    if isinstance(content, list):
        for value in content:
            yield from class_specs(value, option)
    if isinstance(content, dict):
        if "class_path" in content:
            yield option, content
        for key, value in content.items():
            inner = option if key in ("init_args", "dict_kwargs") else f"{option}.{key}".strip(".")
            yield from class_specs(value, inner)


def check_spec(option: str, spec: dict[str, Any]) -> None:
    """Refuse a class that is not allowed, by its text, and arguments that are none."""
    path, arguments = spec["class_path"], spec.get("init_args")
    if not isinstance(path, str):
        raise ValueError(f"{option}.class_path: {path} must be the name of a class")
    if "." in path:
        require_allowed(path)
    others = [key for key in spec if key not in ("class_path", "init_args", "dict_kwargs")]
    if others:
        raise ValueError(f"{option}: {others[0]} stands beside class_path: put it into init_args")
    if arguments is not None and not isinstance(arguments, dict):
        raise ValueError(
            f"{option}.init_args: {arguments} must be a mapping such as {{name: value}}"
        )


def with_config(args: list[str]) -> list[str]:
    """The arguments, and before them the config of the run that `--ckpt_path` names where no config is given."""
    if any(given(args, *CONFIG)):
        return args
    for _, named in given(args, "--ckpt_path"):
        if named not in (*RESUME, "null"):
            return [args[0], "--config", str(Run.open(named).path / "config.yaml"), *args[1:]]
    return args
