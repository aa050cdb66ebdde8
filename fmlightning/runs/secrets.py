"""Keys, tokens and passwords stay out of a run's files.

A run writes its options to `config.yaml`, its command to `manifest.json`, and both go to W&B. So an option that holds a
secret is refused before anything is written; what needs a key reads it from the environment. What others say, in an
error for instance, is written without the secrets that the environment holds.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NAME = re.compile(
    r"(key|token|secret|passw(or)?d|passphrase|credentials?|(^|_)(pat|auth|webhook(_url)?))(_id)?$",
    re.IGNORECASE,
)
OPTION = re.compile(
    r"(^|_)(api_?key|access_?key|auth|token|secret|passw(or)?d|passphrase)$", re.IGNORECASE
)
IN_URL = re.compile(r"\w+://[^/\s@]+@")
SHORTEST = 8
"""The length of the shortest key: a shorter text may be part of any word."""


def in_environment() -> dict[str, str]:
    """The secrets of the environment, by the name of their variable."""
    return {
        name: value
        for name, value in os.environ.items()
        if NAME.search(name) and len(value) >= SHORTEST and not is_path(value)
    }


def is_path(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False


def require_no_secret(options: Iterable[tuple[str, Any]]) -> None:
    """Refuse options that hold a secret; the message does not repeat it.

    Raises:
        ValueError: a value is that of a secret variable, or is an address with a password, or is called a secret.
    """
    held = in_environment()
    for name, value in options:
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (why := reason(name, text, held)):
                raise ValueError(
                    f"--{name} {why}, and would be written to config.yaml, manifest.json and W&B: leave it in the "
                    "environment and out of the options"
                )


def reason(name: str, text: str, held: dict[str, str]) -> str:
    """The reason why an option holds a secret, or nothing."""
    found = next((variable for variable, secret in held.items() if secret in text), None)
    if found:
        return f"holds the value of ${found}"
    if IN_URL.search(text):
        return "holds an address with a user or password in it"
    return "is a secret by its name" if text and OPTION.search(name.rsplit(".", 1)[-1]) else ""


def without_secrets(text: str) -> str:
    """A text with the name of the variable where the secret was."""
    for name, value in in_environment().items():
        text = text.replace(value, f"<{name}>")
    return IN_URL.sub(lambda found: found[0].split("://")[0] + "://", text)


def as_options(args: Iterable[str]) -> list[tuple[str, str]]:
    """The words of a command line, each with the option it is for."""
    pairs, name = [], "argument"
    for word in args:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            pairs.append((name, value))
        else:
            pairs.append((name, word))
    return pairs
