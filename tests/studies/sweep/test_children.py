"""A forked child is, from outside and within, the process that the command would have been."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from fmlightning.studies.sweep import children

CHILD = """
import atexit, json, os, signal, sys, time
atexit.register(lambda: print("at exit"))
print(json.dumps({
    "argv": sys.argv, "name": __name__, "env": dict(os.environ), "session": os.getsid(0), "pid": os.getpid(),
    "cwd": os.getcwd(), "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
}), flush=True)
print("to stderr", file=sys.stderr)
if "wait" in sys.argv:
    time.sleep(60)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture(params=[False, True], ids=["python", "fork"])
def start(request, tmp_path, monkeypatch):
    """Start CHILD with some words; its log has a line already."""
    monkeypatch.setattr(children, "PRELOAD", [])
    (tmp_path / "child.py").write_text(CHILD)
    log = tmp_path / "log"
    log.write_text("before\n")

    def begin(*words, **env):
        command = (sys.executable, str(tmp_path / "child.py"), *words)
        return children.start(command, log, {**os.environ, **env}, fork=request.param), log

    return begin


def said(log):
    return json.loads(log.read_text().splitlines()[1])


def test_it_is_the_command(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    child, log = start("3", ONLY_HERE="yes")
    assert child.wait(60) == child.poll() == 3
    assert log.read_text().startswith("before\n{")
    assert {"to stderr", "at exit"} <= set(log.read_text().splitlines())
    found = said(log)
    assert found["argv"] == [str(tmp_path / "child.py"), "3"]
    assert found["name"] == "__main__"
    assert found["pid"] == found["session"] == child.pid  # Ctrl-C does not reach it
    assert found["env"]["ONLY_HERE"] == "yes"
    assert found["cwd"] == str(tmp_path)
    assert "ONLY_HERE" not in os.environ


def test_each_has_its_own_environment(start):
    """As slots have their own GPU; a server that runs already has that of the first."""
    for slot in ("0", "1"):
        child, log = start("0", SLOT=slot)
        assert child.wait(60) == 0
        last = [line for line in log.read_text().splitlines() if line.startswith("{")][-1]
        assert json.loads(last)["env"]["SLOT"] == slot


def test_it_can_be_told_to_end(start):
    child, log = start("0", "wait")
    end = time.monotonic() + 60
    while len(log.read_text().splitlines()) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    assert child.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.01)
    child.terminate()
    assert child.wait(60) == -signal.SIGTERM
    assert said(log)["interrupt"]


def test_a_module_runs_as_by_its_name(tmp_path, monkeypatch):
    """And loads torch with the number of threads that it was given."""
    monkeypatch.setattr(children, "PRELOAD", [])
    log = tmp_path / "log"
    command = (sys.executable, "-m", "fmlightning", "--version")
    child = children.start(command, log, dict(os.environ), fork=True)
    assert child.wait(60) == 0
    assert log.read_text().startswith("fmlightning ")
