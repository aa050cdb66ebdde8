"""The command `fmlightning`: sends each subcommand to its room, and turns an error into one message.

Commands that need no model start without torch.
"""

import os
import sys

HELP = """\
usage: fmlightning COMMAND ...

Train, sample and compare flow matching models.

train (LightningCLI: every option of model, data, trainer and callbacks; --help lists them)
  fit --config FILE       train; the run directory is printed at the start and at the end
  validate | test         score the last checkpoint of a config's run, or --ckpt_path RUN
  predict                 generate one sample for each test sample and save them

use
  sample RUN --n N        generate samples from a trained run: a picture and an .npz file
  verify                  hold the mathematics against closed-form oracles and print the table

look (these start at once)
  ls [DIR]                list the runs below a directory
  show RUN                what a run was, how it ended, its scores and its pictures
  report RUN...           a table of scores over runs: mean, spread, number of seeds

  --version   --help      `fmlightning COMMAND --help` explains one command
  --debug                 with any command: show the traceback of an error
"""

TRAINER = ("fit", "validate", "test", "predict")
COMMANDS = (*TRAINER, "sample", "verify", "ls", "show", "report")


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status: 0, or 2 for an error of the user's."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv or bool(os.environ.get("FMLIGHTNING_DEBUG"))
    argv = [a for a in argv if a != "--debug"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if argv[0] in ("-V", "--version"):
        from fmlightning import __version__

        print(f"fmlightning {__version__}")
        return 0
    try:
        return run(argv[0], argv[1:])
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if debug or not is_users(error):
            raise
        print(f"error: {message(error)}", file=sys.stderr)
        return 2


def run(command: str, argv: list[str]) -> int:
    if command in TRAINER:
        from fmlightning.cli import train

        return train([command, *argv])
    if command == "sample":
        from fmlightning.sample import main as sample

        return sample(argv)
    if command == "verify":
        from fmlightning.verify import main as verify

        return verify(argv)
    if command in ("ls", "show", "report"):
        from fmlightning import report

        return getattr(report, f"main_{command}")(argv)
    import difflib

    close = difflib.get_close_matches(command, COMMANDS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"unknown command {command!r}: {hint}the commands are {', '.join(COMMANDS)}")


def is_users(error: Exception) -> bool:
    """Whether an error is about what was asked for, and so needs a message and not a traceback."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(
        names & {"ValueError", "OSError", "MisconfigurationException", "SolverError", "YAMLError"}
    )


def message(error: Exception) -> str:
    return (
        f"{error.strerror}: {error.filename}"
        if isinstance(error, OSError) and error.filename
        else str(error)
    )


if __name__ == "__main__":
    sys.exit(main())
