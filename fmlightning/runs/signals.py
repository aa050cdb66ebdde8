r"""Signals to a run, and the exit status of its command.

    USR1, USR2   75    stop for now: run the same command again (EX_TEMPFAIL of BSD's sysexits.h)
    TERM        143    stop for good: scancel, or a machine that goes down
    Ctrl-C      130    stop for good; a second Ctrl-C does not wait for anything

A handler runs in the middle of whatever it interrupts, so it only notes the signal. The note is read where a step has
ended, and where all processes can agree on it.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

EXIT_CODES = {
    signal.SIGINT: 130,
    signal.SIGTERM: 143,
    signal.SIGUSR1: 75,
    signal.SIGUSR2: 75,
}


STOP_AFTER = "FMLIGHTNING_STOP_AFTER"
"""A step after which a run stops as if it was sent USR1: how `reproduce` repeats one that was stopped there."""


@dataclass
class SignalState:
    """The signals of this process; 0 is none.

    Attributes:
        received: the signal it was sent. Of several the largest counts, and TERM is larger than USR1 and USR2.
        agreed: the signal that all processes stop for.
        process: whose state this is; a data worker is a copy of its run.
    """

    received: int = 0
    agreed: int = 0
    process: int = 0


SIGNAL_STATE = SignalState()


def handle(signum: int, frame: FrameType | None) -> None:
    """The one handler."""
    if os.getpid() != SIGNAL_STATE.process:
        if signum == signal.SIGTERM:
            os._exit(EXIT_CODES[signal.SIGTERM])
        return
    if signum == SIGNAL_STATE.received == signal.SIGINT:
        os._exit(EXIT_CODES[signal.SIGINT])
    SIGNAL_STATE.received = max(SIGNAL_STATE.received, signum)


def listen(*signals: signal.Signals) -> None:
    """Note these signals from now on."""
    if threading.current_thread() is threading.main_thread():
        for each in signals:
            signal.signal(each, handle)


@contextmanager
def listening() -> Iterator[None]:
    """Take a note of what a scheduler sends; after a stop, stay deaf until the process has gone."""
    SIGNAL_STATE.received, SIGNAL_STATE.agreed, SIGNAL_STATE.process = 0, 0, os.getpid()
    before = {each: signal.getsignal(each) for each in EXIT_CODES}
    listen(signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for each, handler in before.items():
                signal.signal(
                    each, signal.SIG_IGN if SIGNAL_STATE.agreed else handler or signal.SIG_DFL
                )
