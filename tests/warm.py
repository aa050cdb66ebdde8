"""Processes that start warm.

A Python that imports torch and Lightning works for five seconds before it does anything. So one parent imports them
once, computes nothing, and forks for each command: a process of its own, with its own environment, folder, output and
exit status, that ends as any Python does. Tests of how a process starts take a cold one.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO, NoReturn

PRELOAD = (
    "fmlightning.cli.fit", "fmlightning.cli.sample", "fmlightning.studies.evaluate.scoring", "matplotlib.pyplot",
    "sklearn.datasets",
)  # fmt: skip
REPOSITORY = Path(__file__).parent.parent


@cache
def address() -> str:
    """Where the parent listens; it is started when it is first asked for, and ends with this process."""
    folder = tempfile.TemporaryDirectory()
    path = str(Path(folder.name) / "socket")
    parent = subprocess.Popen(
        [sys.executable, __file__, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )

    def close() -> None:
        parent.communicate()
        folder.cleanup()

    atexit.register(close)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"ready\n"
    return path


class Warm:
    """A command in a fork, in a session of its own: what `subprocess.Popen` has of it.

    Args:
        argv: `python -m MODULE ...`, `python -c CODE ...` or `python FILE ...`.
        output: an open file for all that it prints.
        error: another for the standard error.
        env: its whole environment; by default that of this process.
    """

    def __init__(
        self, argv: Sequence[object], output: IO[str], error: IO[str] | None = None, *, cwd: Path = REPOSITORY,
        env: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.args = [str(word) for word in argv]
        self.returncode: int | None = None
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(address())
        environment = dict(os.environ if env is None else env)
        request = {"words": self.args[1:], "cwd": str(cwd), "env": environment}
        content = json.dumps(request).encode()
        files = [output.fileno(), (error or output).fileno()]
        socket.send_fds(self.socket, [len(content).to_bytes(8, "big")], files)
        self.socket.sendall(content)
        self.lines = self.socket.makefile("r")
        self.pid = int(self.lines.readline())

    def poll(self) -> int | None:
        ready = self.returncode is None and select.select([self.socket], [], [], 0)[0]
        return self.wait() if ready else self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.socket], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            self.returncode = int(self.lines.readline())
            self.lines.close()
            self.socket.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    argv: Sequence[object],
    *,
    timeout: float = 300,
    cwd: Path = REPOSITORY,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, as `subprocess.run` does."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as error:
        process = Warm(argv, output, error, cwd=cwd, env=env)
        try:
            status = process.wait(timeout)
        except BaseException:
            process.kill()
            raise
        shown = []
        for file in (output, error):
            file.seek(0)
            shown.append(file.read())
    return subprocess.CompletedProcess(process.args, status, *shown)


# -- in the parent ----------------------------------------------------------------------------------


def serve(path: str) -> list[str]:
    """Fork for each request until the standard input ends; returns, in a fork, the words of its command."""
    door = socket.socket(socket.AF_UNIX)
    door.bind(path)
    door.listen()
    ended, end = socket.socketpair()
    for one in (ended, end):
        one.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(end.fileno())
    running: dict[int, socket.socket] = {}
    os.write(1, b"ready\n")
    while True:
        ready = select.select([door, ended, sys.stdin], [], [])[0]
        if ended in ready:
            ended.recv(4096)
            tell(running)
        if door in ready:
            caller, _ = door.accept()
            start, files, _, _ = socket.recv_fds(caller, 8, 2)
            request = json.loads(caller.makefile("rb").read(int.from_bytes(start, "big")))
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for other in (door, ended, end, caller, *running.values()):
                    other.close()
                return become(files, **request)
            for file in files:
                os.close(file)
            caller.sendall(f"{pid}\n".encode())
            running[pid] = caller
        if sys.stdin in ready:
            os._exit(0)


def tell(running: dict[int, socket.socket]) -> None:
    """Say of each process that has ended how."""
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        caller = running.pop(pid)
        with suppress(OSError):  # nobody waits
            caller.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        caller.close()


def become(files: list[int], words: list[str], cwd: str, env: dict[str, str]) -> list[str]:
    """Take on the output, the folder and the environment of a command."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate((nothing, *files)):
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    first = cwd if words[0] == "-m" else "" if words[0] == "-c" else str(Path(words[0]).parent)
    beside = [p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p and p not in sys.path]
    sys.path[:1] = [first, *beside]
    for folder in beside:  # as Python does when it starts
        if (custom := Path(folder) / "sitecustomize.py").is_file():
            runpy.run_path(str(custom))
    return words


def execute(first: str, *others: str) -> None:
    """Do what Python does with the words of its command line."""
    if first == "-m":
        sys.argv = list(others)
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *others[1:]]
        exec(others[0], {"__name__": "__main__"})
    else:
        sys.argv = [first, *others]
        runpy.run_path(first, run_name="__main__")


def end(command: Callable[[], None]) -> NoReturn:
    """Run a command and end as Python does, but without clearing its memory, which takes two seconds."""
    status = 0
    try:
        command()
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status & 0xFF)


if __name__ == "__main__":
    for preloaded in PRELOAD:
        import_module(preloaded)
    gc.freeze()  # what is loaded stays, and a collection in a fork need not touch it
    words = serve(sys.argv[1])
    end(lambda: execute(*words))
