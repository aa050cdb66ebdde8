"""The command `fmlightning`: sends each subcommand to its file, and turns an error into one message."""

import os
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from importlib import import_module

from fmlightning import __version__
from fmlightning.cli.allowed import allowing
from fmlightning.cli.errors import is_users, message

COMMANDS = {
    # a command -> its file and function; the file is imported when the command is run
    "fit": "fmlightning.cli.fit:fit",
    "find_batch_size": "fmlightning.cli.find_batch_size.command:main",
    "validate": "fmlightning.cli.fit:validate",
    "test": "fmlightning.cli.fit:test",
    "predict": "fmlightning.cli.fit:predict",
    "sample": "fmlightning.cli.sample:main",
    "evaluate": "fmlightning.studies.evaluate.command:main",
    "sweep": "fmlightning.studies.sweep.command:main",
    "reproduce": "fmlightning.cli.reproduce:main",
    "ema": "fmlightning.cli.ema:main",
    "export": "fmlightning.cli.export:main",
    "verify": "fmlightning.cli.verify:main",
    "doctor": "fmlightning.cli.doctor:main",
    "ls": "fmlightning.studies.report.ls:main",
    "show": "fmlightning.studies.report.show:main",
    "report": "fmlightning.studies.report.command:main",
}

HELP = """\
usage: fmlightning COMMAND ...

Train, sample and compare flow matching models.

train (LightningCLI: every option of model, data, trainer and callbacks; --help lists them)
  fit --config FILE       train; the run directory is printed at the start and at the end
  find_batch_size         the largest batch of a config that fits into the memory, and how fast each trains
  validate | test         score the last checkpoint of a config's run, or --ckpt_path RUN
  predict                 generate one sample for each test sample and save them

use
  sample RUN --n N        generate samples from a trained run: an image and an .npz file
  evaluate RUN            score solvers x NFE x guidance on the same weights and noise: table and figure
  sweep FILE              train and evaluate the cells of a comparison: axes x seeds, then solvers x NFE
  reproduce RUN           run a finished run again, and list what came out otherwise
  ema RUN --sigma_rel S   an average of the weights whose width is chosen after training, as a file
  export RUN --out DIR    weights and config as files that plain torch reads
  verify                  check the mathematics against closed-form solutions and print the table
  doctor                  what this machine has, and whether a run trains and resumes on it

look (these start at once)
  ls [DIR]                list the runs below a directory: what differs, status, scores
  show RUN                what a run was, how it ended, its scores, evaluations and images
  report DIR...           tables over seeds, paired differences, curves and a page of runs or of a sweep

  --version   --help      `fmlightning COMMAND --help` explains one command
  --debug                 with any command: show the traceback of an error
  --allow MODULE          with any command: let configs name classes of a module of your own, which is then run

options of true or false: --name, --no_name, or --name true|false
exit status of fit: 75 after USR1 or USR2, 143 after TERM, 130 after Ctrl-C; --ckpt_path auto goes on from there
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 where it found a fault, or 2 for an error of the user's."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv or bool(os.environ.get("FMLIGHTNING_DEBUG"))
    argv = [with_home(a) for a in argv if a != "--debug"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"fmlightning {__version__}")
        return 0
    try:
        return run(argv)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if debug or not is_users(error):
            raise
        print(f"error: {message(error)}", file=sys.stderr)
        return 2


def with_home(word: str) -> str:
    """A word with the home directory for its `~`, which a shell leaves in `--out=~/file`."""
    name, equals, value = word.partition("=")
    if word.startswith("-") and value.startswith("~"):
        return name + equals + os.path.expanduser(value)
    return os.path.expanduser(word)


def run(argv: list[str]) -> int:
    """Run the command that stands first.

    Raises:
        ValueError: there is no such command.
    """
    modules: list[str] = []
    if argv[0] != "reproduce":  # hands --allow on to the command it starts
        modules, argv = split_allow(argv)
    if not argv:
        raise ValueError("--allow goes with a command: fmlightning --help lists them")
    if argv[0] not in COMMANDS:
        close = get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"unknown command {argv[0]!r}: {hint}the commands are {', '.join(COMMANDS)}"
        )
    module, function = COMMANDS[argv[0]].split(":")
    with allowing(modules):
        status: int = getattr(import_module(module), function)(argv[1:])
    return status


def split_allow(argv: list[str]) -> tuple[list[str], list[str]]:
    """The modules that `--allow` names, and the other arguments."""
    modules, others = [], []
    words: Iterator[str] = iter(argv)
    for word in words:
        if word == "--allow" or word.startswith("--allow="):
            modules.append(word.partition("=")[2] or next(words, ""))
        else:
            others.append(word)
    return modules, others


if __name__ == "__main__":
    sys.exit(main())
