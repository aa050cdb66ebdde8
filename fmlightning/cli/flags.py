"""Options of true or false, written alike in every command.

`--name` switches it on and `--no_name` off; `--name true` and `--name=false` are read too, as in a config.
"""

from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise

TRUE = ("true", "yes", "on")
FALSE = ("false", "no", "off")


def with_values(argv: Sequence[str], flags: Collection[str]) -> Iterator[str]:
    """The words of a command line, with its value after every flag.

    Args:
        flags: the options of true or false, such as `--rerun`.
    """
    for word, following in pairwise((*argv, "")):
        if word in flags and following.lower() not in (*TRUE, *FALSE):
            yield f"{word}=true"
        elif word.startswith("--no_") and (name := f"--{word[5:]}") in flags:
            yield f"{name}=false"
        else:
            yield word
