"""Weights & Biases: a mirror of the run directory, offline unless there is an account.

No run depends on it. All writes go through a queue that a thread of its own empties, so a mirror that fails, hangs or
fills its disk costs a run one message and nothing else. wandb has a process of its own, but waits for it: `finish`
has no time limit, and does not return where that process has been stopped.
"""

import netrc
import os
import shutil
import threading
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Full, Queue
from typing import Any, Literal

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

Mode = Literal["auto", "online", "offline", "disabled"]

MAX_QUEUED = 1000
"""Writes that may wait in the queue: with more, the mirror has stopped."""

MIN_FREE_BYTES = 1 << 20
"""Bytes that must be free where W&B keeps its files: it does not report a full disk itself."""

CLOSE_TIMEOUT = {"offline": 30.0, "online": 300.0}
"""Seconds that the end of a run waits for the mirror."""


@dataclass
class Tracking:
    """The place where metrics and images are mirrored.

    Args:
        mode: online, offline or disabled; auto follows $WANDB_MODE, then is online where a key is found in the
            environment or in netrc, and offline otherwise.
        project: the W&B project.
        entity: the W&B user or team; null is the account's default.
        group: a name that runs of one comparison share; null is the experiment's name.
        tags: labels of the run.
    """

    mode: Mode = "auto"
    project: str = "fmlightning"
    entity: str | None = None
    group: str | None = None
    tags: list[str] | None = None


class SafeWandbLogger(WandbLogger):
    """A WandbLogger that cannot stop a run, nor hold it up."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.calls: Queue[Callable[[], object]] = Queue(MAX_QUEUED)
        self.thread: threading.Thread | None = None
        self.ended = threading.Event()
        self.lost = False
        OPENED.append(self)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.send(partial(super().log_metrics, dict(metrics), step))

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        self.send(partial(super().log_hyperparams, params))

    @rank_zero_only
    def log_image(
        self, key: str, images: list[Any], step: int | None = None, **kwargs: Any
    ) -> None:
        self.send(partial(super().log_image, key, images, step, **kwargs))

    def send(self, call: Callable[[], object]) -> None:
        """Have something written when its turn comes."""
        if threading.current_thread() is self.thread:  # it writes one thing by way of another
            call()
            return
        if self.thread is None:
            self.thread = threading.Thread(target=self.work, name="mirror", daemon=True)
            self.thread.start()
        try:
            if not self.lost:
                self.calls.put_nowait(call)
        except Full:
            self.give_up("it does not answer")

    def work(self) -> None:
        """Write what is in the queue, until the mirror is closed or lost."""
        while not self.ended.is_set():
            call = self.calls.get()
            try:
                self.require_space()
                call()
            except Exception as error:  # wandb raises many kinds, and none may stop a run
                self.give_up(str(error) or type(error).__name__)

    def require_space(self) -> None:
        folder = Path(self.experiment.dir)
        if shutil.disk_usage(folder).free < MIN_FREE_BYTES:
            raise OSError(f"no space left for {folder}")

    def give_up(self, why: str) -> None:
        """Report once that the mirror is gone."""
        if not self.lost:
            self.lost = True
            self.ended.set()
            print(
                f"warning: W&B is lost ({why}): this run goes on, logged to its directory only",
                flush=True,
            )

    def close(self) -> None:
        """Wait until all is written, but not for ever, and finish the W&B run."""
        if self._experiment is None:
            return
        limit = CLOSE_TIMEOUT[self._wandb_init["mode"]]
        self.send(self._experiment.finish)
        self.send(self.ended.set)
        if not self.ended.wait(limit):
            self.give_up(f"it did not finish in {limit:g} s")
        if self.lost:
            abandon()


OPENED: list[SafeWandbLogger] = []
"""The mirrors of this process that are not closed."""


def abandon() -> None:
    """Leave W&B without its farewell at exit, which would raise, or wait for a process that is gone."""
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib import module
    from wandb.sdk.lib.service import service_token

    with suppress(AttributeError):  # none of this is promised by wandb
        setup, wandb_setup._singleton = wandb_setup._singleton, None
        module.unset_globals()
        service_token.clear_service_in_env()
        setup._connection._cleanup()  # type: ignore[union-attr, misc]
        setup._connection._proc._process.kill()  # type: ignore[union-attr]


def wandb_logger(
    tracking: Tracking, folder: Path, experiment: str, again: bool = False
) -> SafeWandbLogger | None:
    """The logger of a run, whose id is that of its directory; None if disabled.

    Args:
        again: whether the run that is in the directory will be kept aside.
    """
    mode = resolve_mode(tracking.mode)
    if mode == "disabled":
        return None
    if mode == "offline":
        why = "offline" if has_key() else "no account, so offline"
        rank_zero_only(print)(
            f"W&B: {why} in {folder}/wandb; to upload: wandb sync {folder}/wandb/offline-run-*"
        )
    import wandb

    # runs that were kept aside as <folder>.1, .2, ... have had the ids before this one
    kept = len(list(folder.parent.glob(f"{folder.name}.*"))) + (again and folder.exists())
    run_id = "-".join((*folder.parts[-2:], *([str(kept + 1)] if kept else [])))
    # `mode` goes to wandb.init: WandbLogger's own `offline` only sets a variable that wandb may ignore
    options: dict[str, Any] = {
        "mode": mode,
        "entity": tracking.entity,
        "group": tracking.group or experiment,
        "tags": tracking.tags,
        "resume": "allow",
        "settings": wandb.Settings(silent=True, console="off", init_timeout=30),
    }
    logger = SafeWandbLogger(
        name=run_id,
        id=run_id,
        project=tracking.project,
        save_dir=folder,
        log_model=False,
        **options,
    )
    logger._wandb_init.pop("anonymous", None)  # wandb warns of it in every run
    return logger


def resolve_mode(mode: Mode) -> str:
    """The mode that `auto` stands for here.

    Raises:
        ValueError: online was asked for and there is no key, or $WANDB_MODE is none of the modes.
    """
    named = os.environ.get("WANDB_MODE") if mode == "auto" else mode
    found = {"dryrun": "offline", "run": "online"}.get(named, named) if named else None
    if found is None:
        return "online" if has_key() else "offline"
    if found not in ("online", "offline", "disabled"):
        raise ValueError(f"WANDB_MODE={named} is unknown: choose online, offline or disabled")
    if found == "online" and not has_key():
        raise ValueError(
            "wandb.mode=online needs an API key: run `wandb login`, or set --wandb.mode offline"
        )
    return found


def has_key() -> bool:
    """True where W&B finds an API key without asking for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def reachable(logger: Logger) -> bool:
    """Start a logger; one that does not start is reported once, and the run goes on with its files."""
    if not isinstance(logger, WandbLogger):
        return True
    try:
        _ = logger.experiment
        without_import_hooks()
    except Exception as error:  # wandb raises many kinds, and none may stop a run
        print(f"W&B is not reachable ({error}): this run is logged to its directory only")
        return False
    return True


def without_import_hooks() -> None:
    """Let no `import` anywhere report to W&B: once its process is gone, that import would fail."""
    from wandb.sdk.lib import import_hooks

    import_hooks.unregister_all_post_import_hooks()


def close_mirror() -> None:
    """Finish the W&B run of this process, so that its file is whole and the next run does not join it."""
    while OPENED:
        OPENED.pop().close()
