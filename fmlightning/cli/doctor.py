"""`fmlightning doctor`: one page on what this machine has, as plain text to be pasted into a bug report.

Every line is a mark, a thing and what was found: `ok`; `note` for what not everyone needs, with what to do about
it; `FAIL` for what training needs. No check stops another, and none prints a key or the name of a home directory.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from urllib.parse import urlsplit

from fmlightning.cli.argparser import Parser
from fmlightning.runs.directory import runs_root
from fmlightning.runs.files import write_text
from fmlightning.runs.secrets import without_secrets

DESCRIPTION = """Check this machine, and that a short run trains and resumes on it: plain text for a bug report,
without keys and with ~ for the home directory. The exit status is 1 where something that training needs fails."""

GB = 1e9
LITTLE_DISK = 5 * GB
WIDTH = 110


@dataclass(frozen=True)
class Line:
    """One finding.

    Attributes:
        what: was looked at.
        found: there.
        remedy: what to do about it; empty where all is well.
        needed: whether training fails without it.
    """

    what: str
    found: str
    remedy: str = ""
    needed: bool = False

    @property
    def fails(self) -> bool:
        return bool(self.remedy) and self.needed

    @property
    def mark(self) -> str:
        return "FAIL" if self.fails else "note" if self.remedy else "ok"

    def __str__(self) -> str:
        """The line, and those it is continued on."""
        start = f"{self.mark:5} {self.what:16} "
        text = public(self.found + (f" -> {self.remedy}" if self.remedy else ""))
        return textwrap.fill(text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start),
                             break_long_words=False, break_on_hyphens=False)  # fmt: skip


def main(argv: list[str]) -> int:
    """Print the page; return 1 if something needed fails."""
    parser = Parser("doctor", DESCRIPTION)
    parser.add_flag("--training", "train a run that is killed and resumed", default=True)
    parser.add_argument(
        "--runs_root", type=Path, default=runs_root(), help="by default $FMLIGHTNING_RUNS or runs/"
    )
    parser.add_argument("--accelerator", default="cpu", help="of the short run: cpu, gpu, mps")
    options = parser.parse_args(argv)
    if rank():
        return 0  # one page from one process
    checks: dict[str, Check] = {
        **CHECKS,
        "runs": lambda: check_disk(options.runs_root),
        **({"training": lambda: check_training(options.accelerator)} if options.training else {}),
    }  # fmt: skip
    print(f"fmlightning doctor, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC\n")
    failed = []
    for name, check in checks.items():
        for line in run_check(name, check):
            print(line, flush=True)
            failed += [line.what] if line.fails else []
    with suppress(Exception):  # without torch there is a line of that above
        print(f"\n{public(environment())}")
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nall that training needs is here")
    return int(bool(failed))


Check = Callable[[], Iterator[Line]]


def run_check(name: str, check: Check) -> Iterator[Line]:
    """The lines of a check, whatever happens in it."""
    try:
        yield from check()
    except Exception as error:
        yield broken(name, error)


def broken(name: str, error: Exception) -> Line:
    words = " ".join(str(error).split())[:300]
    return Line(name, f"{type(error).__name__}: {words}", "this check itself failed", needed=True)


def public(text: str) -> str:
    """A text without the secrets of the environment, and with ~ for the home directory."""
    home = re.escape(str(Path.home()))
    return re.sub(rf"{home}(?![\w.-])", "~" if home != "/" else home, without_secrets(text))


def rank() -> int:
    """The number of this process among those of a launcher."""
    named = [os.environ.get(name) for name in ("RANK", "SLURM_PROCID")]
    return next((int(n) for n in named if n and n.isdigit()), 0)


def check_package() -> Iterator[Line]:
    from fmlightning import __version__

    folder = Path(__file__).parent
    commit = commit_of(folder.parent)
    yield Line("fmlightning", f"{__version__} in {folder}" + (f", commit {commit}" if commit else ""))  # fmt: skip
    yield Line("python", sys.executable)


def commit_of(checkout: Path) -> str:
    """The commit of a checkout, marked where it has uncommitted changes; nothing of an installed package."""
    git = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    if not (checkout / ".git").exists():
        return ""
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def check_packages() -> Iterator[Line]:
    """The direct dependencies: whether each is there in a version that will do."""
    from packaging.requirements import Requirement

    found, wrong = [], []
    for requirement in map(Requirement, requires("fmlightning") or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        here = installed(requirement.name)
        found.append(f"{requirement.name} {here or 'missing'}")
        if here is None or not requirement.specifier.contains(here, prereleases=True):
            wrong.append(Line("package", found[-1], f"pip install '{requirement}'", needed=True))
    yield Line("packages", ", ".join(found))
    yield from wrong


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_imports() -> Iterator[Line]:
    """Import the large ones: a torchvision built for another torch does not."""
    for name in ("torch", "torchvision", "lightning.pytorch"):
        try:
            module = __import__(name)
        except Exception as error:
            words = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            remedy = "install torch and torchvision of one release: https://pytorch.org/get-started"
            yield Line(f"import {name}", words, remedy, needed=True)
            return
        if name == "torch":
            yield Line("torch", f"{module.__version__}, built for CUDA {module.version.cuda or '(none)'}")  # fmt: skip


def check_gpus() -> Iterator[Line]:
    """Each GPU by a product of matrices, and whether bf16 is of use."""
    import torch

    if not torch.cuda.is_available():
        mps = torch.backends.mps.is_available()
        seen = shutil.which("nvidia-smi") is not None
        remedy = "nvidia-smi is here: install torch for CUDA, and compare its CUDA with the driver"
        found = "Apple's, by mps" if mps else "none: training runs on the CPU"
        yield Line("GPU", found, remedy if seen else "")
        return
    for n in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(n)
        free, total = torch.cuda.mem_get_info(n)
        bf16 = "bf16" if card.major >= 8 else "no bf16"
        words = f"{card.name}, {free / GB:.0f} of {total / GB:.0f} GB free, {bf16}"
        words += f", capability {card.major}.{card.minor}"
        x = torch.full((64, 64), 2.0, device=f"cuda:{n}")
        right = float((x @ x).sum()) == 64**3 * 4
        yield Line(f"GPU {n}", words, "" if right else "a product of matrices is wrong", needed=True)  # fmt: skip


def check_cpu() -> Iterator[Line]:
    """The threads of torch against the cores that this process may use."""
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    words = f"{os.cpu_count()} cores, {usable} usable, {threads} threads of torch"
    crowded = threads > (usable or threads)
    yield Line("CPU", words, f"set OMP_NUM_THREADS={usable}" if crowded else "")


def check_wandb() -> Iterator[Line]:
    from fmlightning.training.tracking import has_key, resolve_mode

    try:
        mode = resolve_mode("auto")
    except ValueError as error:
        yield Line("W&B", "--wandb.mode auto fails", str(error), needed=True)
        return
    named = [f"WANDB_MODE={os.environ['WANDB_MODE']}"] if os.environ.get("WANDB_MODE") else []
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "")).hostname
    named += [f"server {server}"] if server else []
    kept = " (kept in the run's directory, for wandb sync)" if mode == "offline" else ""
    key = "no key" if not has_key() else "a key in netrc"
    key = "a key in $WANDB_API_KEY" if os.environ.get("WANDB_API_KEY") else key
    yield Line("W&B", ", ".join((f"--wandb.mode auto is {mode}{kept}", key, *named)))


def check_inception() -> Iterator[Line]:
    from fmlightning.metrics.features.networks import (
        VARIABLE,
        WEIGHTS,
        hub_folder,
        inception_weights,
    )

    try:
        path = inception_weights(None)
    except ValueError as error:
        yield Line("Inception", str(error), f"unset {VARIABLE} or name the file", needed=True)
        return
    if path is None:
        words = f"no ${VARIABLE}, no {hub_folder() / WEIGHTS}"
        yield Line("Inception", words, "only FID needs it: put it there")
        return
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    known = digest.startswith(WEIGHTS.rsplit("-", 1)[-1].removesuffix(".pth"))
    remedy = "" if known else f"not torch-fidelity's {WEIGHTS}: FIDs from it compare with nobody's"
    yield Line("Inception", f"{path}, sha256 {digest}", remedy)


def check_disk(root: Path) -> Iterator[Line]:
    """Put a file in place as checkpoints are: written, synchronised and renamed."""
    there = next(p for p in (root.absolute(), *root.absolute().parents) if p.exists())
    where = str(root) if there == root.absolute() else f"{root} (to be made in {there})"
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".fmlightning-doctor-") as folder:
            write_text(Path(folder) / "file", "0" * 65536)
    except OSError as error:
        remedy = "name a directory you may write to in $FMLIGHTNING_RUNS or --run_dir"
        yield Line("runs", f"{where}: {error.strerror}", remedy, needed=True)
        return
    free = shutil.disk_usage(there).free
    words = f"{where}: write, fsync and rename work, {free / GB:.0f} GB free"
    yield Line("runs", words, "checkpoints take space: free some" if free < LITTLE_DISK else "")


def check_training(accelerator: str) -> Iterator[Line]:
    """Train without a break, and again with a `kill -9` in the middle and the same command once more."""
    from fmlightning.cli.resume_check import Failed, TooLate, check_resume

    print("... a short run, killed and resumed ", end="", file=sys.stderr, flush=True)
    try:
        seen = check_resume(accelerator)
    except Failed as error:
        yield Line("training", str(error), "see what fmlightning fit says", needed=True)
        return
    except TooLate:
        yield Line(
            "training", "the run ended before it was killed", "once more on a quieter machine"
        )
        return
    finally:
        print(file=sys.stderr)
    words = f"a short run on {accelerator}, kill -9 after step {seen.step}, resumed ({seen.seconds:.0f} s):"
    if seen.differing:
        words += f" {', '.join(seen.differing)} are not those of a run without a break"
        yield Line("training", words, "report this", needed=True)
        return
    yield Line(
        "training",
        f"{words} weights, EMA, optimiser and metrics are bit for bit those of a run without a break",
    )


def environment() -> str:
    """The system, the compilers and the drivers, as torch collects them for a bug report."""
    from torch.utils.collect_env import get_env_info, pretty_str

    found = get_env_info()
    cpu = [line for line in str(found.cpu_info).splitlines() if line.startswith("Model name")]
    # the packages are those above, and of a processor its name is enough
    return pretty_str(found._replace(cpu_info="\n".join(cpu), pip_packages="", conda_packages=""))


CHECKS: dict[str, Check] = {
    "fmlightning": check_package,
    "packages": check_packages,
    "imports": check_imports,
    "GPU": check_gpus,
    "CPU": check_cpu,
    "W&B": check_wandb,
    "Inception": check_inception,
}
