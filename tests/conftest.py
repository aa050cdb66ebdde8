"""What every test gets: no account, no network, files in a temporary folder, and no hidden global randomness."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# before torch is imported: two test processes share two cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true", FMLIGHTNING_DEBUG="")
for name in ("WANDB_API_KEY", "RANK", "WORLD_SIZE", "LOCAL_RANK", "FMLIGHTNING_INCEPTION"):
    os.environ.pop(name, None)

# what tests start can be stopped, as from a terminal, even where they run behind nohup or &
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest  # noqa: E402
import shapes  # noqa: E402
import warm  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# the shapes in the signatures are checked while the tests run, and cost nothing otherwise
install_import_hook("fmlightning.flow", "shapes.first_calls")

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def shapes_are_checked() -> None:
    """Every test has the shapes of its first calls checked."""
    shapes.start()


@pytest.fixture(autouse=True)
def wandb_of_ones_own() -> None:
    """A process started by a test gets a W&B service of its own, not the one of a test before it in this process."""
    os.environ.pop("WANDB_SERVICE", None)


@pytest.fixture(autouse=True)
def no_processes_beside() -> None:
    """A process started by a test meets no others by what a test before it left in the environment."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK"):
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def no_modules_left(tmp_path: Path) -> Iterator[None]:
    """A module that a test writes is not what the next test finds under its name."""
    yield
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(f"{tmp_path}{os.sep}"):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def runs_below_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs go to a temporary folder, and W&B keeps its own files there too."""
    root = tmp_path / "runs"
    monkeypatch.setenv("FMLIGHTNING_RUNS", str(root))
    monkeypatch.setenv("FMLIGHTNING_CACHE", str(tmp_path / "cache"))
    for variable in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "wandb"))
    return root


@pytest.fixture
def repository() -> Path:
    return REPOSITORY


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command() -> Command:
    """The real command in a process of its own: `command("fit", "--config", ...)`.

    It starts warm; a test of how it starts says `cold=True`.
    """

    def call(
        *args: str, timeout: float = 300, cold: bool = False
    ) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "fmlightning", *map(str, args)]
        if not cold:
            return warm.run(argv, timeout=timeout)
        return subprocess.run(argv, capture_output=True, text=True, timeout=timeout, cwd=REPOSITORY)

    return call


@pytest.fixture
def fmlightning(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The command in this process, which is faster: returns its exit status and all it printed."""

    def call(*args: str) -> tuple[int, str]:
        from fmlightning.__main__ import main

        status = main([str(a) for a in args])
        shown = capsys.readouterr()
        return status, shown.out + shown.err

    return call


QUICK = (
    "--wandb.mode=disabled", "--samples.at_end=false", "--trajectories.at_end=false", "--evaluation.at_end=false",
    "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.devices=1",
)  # fmt: skip


@pytest.fixture
def fit(fmlightning: Callable[..., tuple[int, str]], tmp_path: Path) -> Callable[..., Path]:
    """Train a config in this process, without pictures and scores; returns the run directory."""

    def call(config: str, *overrides: str, name: str = "run") -> Path:
        folder = tmp_path / name
        path = REPOSITORY / "configs" / f"{config}.yaml"
        status, shown = fmlightning(
            "fit", "--config", str(path), *QUICK, f"--run_dir={folder}", *overrides
        )
        assert status == 0, shown
        return folder

    return call


TRAINED: dict[tuple[str, ...], Path] = {}


@pytest.fixture
def trained(
    fit: Callable[..., Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A run as `fit` trains it, for tests of what is done with it: trained once, and copied for each test.

    Its config names the directory of the first, so a test that trains again in it takes `fit`.
    """

    def call(config: str, *overrides: str, name: str = "run") -> Path:
        key = (config, *overrides)
        if key not in TRAINED:
            run = fit(config, *overrides, name=name)
            kept = tmp_path_factory.mktemp("trained") / "run"
            TRAINED[key] = shutil.copytree(run, kept, symlinks=True)
            return run
        return shutil.copytree(TRAINED[key], tmp_path / name, symlinks=True)

    return call
