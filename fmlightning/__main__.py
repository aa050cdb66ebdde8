"""The command `fmlightning`: sends each subcommand to its room, and turns an error into one message.

Commands that need no model start without torch.
"""

import os
import sys

from fmlightning.cli.allowed import allowing
from fmlightning.cli.errors import is_users, message

HELP = """\
usage: fmlightning COMMAND ...

Train, sample and compare flow matching models.

train (LightningCLI: every option of model, data, trainer and callbacks; --help lists them)
  fit --config FILE       train; the run directory is printed at the start and at the end
  find_batch_size         the largest batch of a config that fits into the memory, and how fast each trains
  validate | test         score the last checkpoint of a config's run, or --ckpt_path RUN
  predict                 generate one sample for each test sample and save them

use
  sample RUN --n N        generate samples from a trained run: a picture and an .npz file
  evaluate RUN            score solvers x NFE x guidance on the same weights and noise: table and figure
  sweep FILE              train and evaluate the cells of a comparison: axes x seeds, then solvers x NFE
  reproduce RUN           run a finished run again, and say what came out otherwise
  ema RUN --sigma-rel S   an average of the weights whose width is chosen after training, as a file
  export RUN --out DIR    weights and config as files that plain torch reads
  verify                  hold the mathematics against closed-form oracles and print the table
  doctor                  what this machine has, and whether a run trains and resumes on it

look (these start at once)
  ls [DIR]                list the runs below a directory: what differs, status, scores
  show RUN                what a run was, how it ended, its scores, evaluations and pictures
  report DIR...           tables over seeds, paired differences, curves and a page of runs or of a sweep

  --version   --help      `fmlightning COMMAND --help` explains one command
  --debug                 with any command: show the traceback of an error
  --allow MODULE          with any command: let configs name classes of a module of your own, which is then run

exit status of fit: 75 after USR1 or USR2, 143 after TERM, 130 after Ctrl-C; --ckpt_path auto goes on from there
"""

TRAINER = ("fit", "validate", "test", "predict")
COMMANDS = (
    *TRAINER,
    "find_batch_size",
    "sample",
    "evaluate",
    "sweep",
    "ema",
    "export",
    "reproduce",
    "verify",
    "doctor",
    "ls",
    "show",
    "report",
)


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 where it found a fault, or 2 for an error of the user's."""
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
        if argv[0] != "reproduce":  # hands it on to the command it starts
            modules, argv = split_allow(argv)
            if not argv:
                raise ValueError("--allow goes with a command: fmlightning --help lists them")
            with allowing(modules):
                return run(argv[0], argv[1:])
        return run(argv[0], argv[1:])
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if debug or not is_users(error):
            raise
        print(f"error: {message(error)}", file=sys.stderr)
        return 2


def split_allow(argv: list[str]) -> tuple[list[str], list[str]]:
    """The modules that `--allow` names, and the other arguments."""
    modules, others, words = [], [], iter(argv)
    for word in words:
        if word == "--allow" or word.startswith("--allow="):
            modules.append(word.partition("=")[2] or next(words, ""))
        else:
            others.append(word)
    return modules, others


def run(command: str, argv: list[str]) -> int:
    if command in TRAINER:  # what is wrong with a file is said before torch is loaded
        from fmlightning.cli.config_files import check_files, with_config

        command, *argv = with_config([command, *argv])
        check_files(argv)
    if command == "fit":
        from fmlightning.runs.signals import listening

        with listening():  # from here, because the next import takes seconds
            from fmlightning.cli.fit import train

            return train([command, *argv])
    if command in TRAINER:
        from fmlightning.cli.fit import train

        return train([command, *argv])
    if command == "find_batch_size":
        from fmlightning.cli.find_batch_size.command import main as find_batch_size

        return find_batch_size(argv)
    if command == "sample":
        from fmlightning.cli.sample import main as sample

        return sample(argv)
    if command == "ema":
        from fmlightning.cli.ema import main as ema

        return ema(argv)
    if command == "export":
        from fmlightning.cli.export import main as export

        return export(argv)
    if command == "evaluate":
        from fmlightning.studies.evaluate.command import main as evaluate

        return evaluate(argv)
    if command == "sweep":
        from fmlightning.studies.sweep.command import main as sweep

        return sweep(argv)
    if command == "verify":
        from fmlightning.cli.verify import main as verify

        return verify(argv)
    if command == "reproduce":
        from fmlightning.cli.reproduce import main as reproduce

        return reproduce(argv)
    if command == "doctor":
        from fmlightning.cli.doctor import main as doctor

        return doctor(argv)
    if command == "ls":
        from fmlightning.studies.report.ls import main as listing

        return listing(argv)
    if command == "show":
        from fmlightning.studies.report.show import main as showing

        return showing(argv)
    if command == "report":
        from fmlightning.studies.report.command import main as report

        return report(argv)
    import difflib

    close = difflib.get_close_matches(command, COMMANDS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"unknown command {command!r}: {hint}the commands are {', '.join(COMMANDS)}")


if __name__ == "__main__":
    sys.exit(main())
