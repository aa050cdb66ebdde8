"""Child processes for the cells of a sweep.

Loading torch and Lightning takes longer than many a small cell does. So on a CPU a server loads them once and forks for
each command (multiprocessing's forkserver). The driver of a GPU does not survive a fork: there a command gets a Python
of its own.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

PRELOAD = ["fmlightning.cli.flow_cli", "fmlightning.studies.evaluate.scoring"]
"""Modules that the server loads; it computes nothing, so that there are no threads to lose in a fork."""


class Child(Protocol):
    """A process at work: what `subprocess.Popen` has of it."""

    pid: int

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def wait(self, timeout: float | None = None) -> int: ...


def start(command: Sequence[str], log: Path, env: Mapping[str, str], fork: bool) -> Child:
    """Run a Python command in a session of its own, so that Ctrl-C does not reach it; it writes at the end of a log.

    Args:
        command: `python -m MODULE ...` or `python FILE ...`, with this Python.
        env: its whole environment.
        fork: whether from the server.
    """
    if fork:
        return Forked(command, log, env)
    with log.open("ab") as file:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=dict(env), start_new_session=True,
        )  # fmt: skip


class Forked:
    """A command that runs in a fork of the server."""

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.command = command
        self.process = context.Process(target=become, args=(list(command), str(log), dict(env)))
        with environment(env):  # how many threads there are is settled when torch is loaded
            self.process.start()
        assert self.process.pid is not None
        self.pid: int = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def terminate(self) -> None:
        self.process.terminate()

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.command, timeout or 0.0)
        return self.process.exitcode


@contextmanager
def environment(env: Mapping[str, str]) -> Iterator[None]:
    """Give this environment to all that is started meanwhile."""
    before = dict(os.environ)
    try:
        replace(env)
        yield
    finally:
        replace(before)


def replace(env: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)


def become(command: Sequence[str], log: str, env: Mapping[str, str]) -> None:
    """Be the command, in the forked process."""
    os.setsid()
    with open(log, "ab") as file:
        for output in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), output.fileno())
    replace(env)
    _, *words = command
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.modules.pop(f"{words[1]}.__main__", None)  # runpy warns of one that is loaded
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
