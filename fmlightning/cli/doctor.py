"""`fmlightning doctor`: one page on what this machine has, as plain text to be pasted into a bug report.

Every line is a mark, a thing and what was found: `ok`; `note` for what not everyone needs, with what to do about
it; `FAIL` for what training needs. No check stops another, and none prints a key or the name of a home directory.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from urllib.parse import urlsplit

from fmlightning.cli.argparser import Parser
from fmlightning.runs.directory import runs_root
from fmlightning.runs.secrets import without_secrets

DESCRIPTION = """What this machine has, and whether a short run trains and resumes on it: plain text for a bug report,
without keys and with ~ for the home directory. The exit status is 1 where something that training needs fails."""

GB = 1e9
LITTLE_DISK, LITTLE_MEMORY = 5 * GB, 2 * GB
WIDTH = 110
LAUNCHERS = {
    "SLURM": ("SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_PROCID"),
    "torchrun": ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
}  # fmt: skip


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
        for line in looked(name, check):
            print(line, flush=True)
            failed += [line.what] if line.fails else []
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nall that training needs is here")
    return int(bool(failed))


Check = Callable[[], Iterator[Line]]


def looked(name: str, check: Check) -> Iterator[Line]:
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
    yield Line("python", f"{platform.python_version()}, {sys.executable}")
    yield Line("system", platform.platform())


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
    """Whether the large ones start: a torchvision built for another torch does not."""
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
    import torch

    if not torch.cuda.is_available():
        mps = torch.backends.mps.is_available()
        yield Line("GPU", "Apple's, by mps" if mps else "none: training runs on the CPU", gpu_remedy())  # fmt: skip
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


def gpu_remedy() -> str:
    """Why a machine with NVIDIA's tools shows torch no GPU."""
    import torch

    if not shutil.which("nvidia-smi"):
        return ""
    if torch.version.cuda is None:
        return "nvidia-smi is here but this torch is built for the CPU: install the CUDA build"
    return "nvidia-smi is here: compare its driver with torch's CUDA, and see CUDA_VISIBLE_DEVICES"


def check_cpu() -> Iterator[Line]:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    named = os.environ.get("OMP_NUM_THREADS")
    words = f"{os.cpu_count()} cores, {usable} usable, {threads} threads of torch, {cpu_name()}"
    words += f", OMP_NUM_THREADS={named}" if named else ""
    crowded = threads > (usable or threads)
    yield Line("CPU", words, f"set OMP_NUM_THREADS={usable}" if crowded else "")


def cpu_name() -> str:
    try:
        names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def check_memory() -> Iterator[Line]:
    page, total = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    words, free = f"{page * total / GB:.1f} GB", page * total
    try:
        available = re.findall(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
        free = int(available[0]) * 1024
        words += f", {free / GB:.1f} GB available"
        words += f", {shutil.disk_usage('/dev/shm').total / GB:.1f} GB shared"
    except (OSError, IndexError):
        pass
    limit = cgroup_limit()
    if limit and limit < page * total:
        words, free = f"{words}, limited to {limit / GB:.1f} GB", min(free, limit)
    yield Line("memory", words, "free some, or expect to be killed" if free < LITTLE_MEMORY else "")


def cgroup_limit() -> int | None:
    """The memory that a container or a job may take."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = Path("/sys/fs/cgroup", name).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None


def check_processes() -> Iterator[Line]:
    from torch import distributed

    if not distributed.is_available():
        yield Line("processes", "torch without torch.distributed", "train on one device")
        return
    gloo, nccl = distributed.is_gloo_available(), distributed.is_nccl_available()
    words = f"gloo {'yes' if gloo else 'no'}, NCCL {nccl_version() if nccl else 'no'}"
    for launcher, names in LAUNCHERS.items():
        seen = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
        words += f", {launcher}: {' '.join(seen) or 'not seen'}"
    yield Line("processes", words)


def nccl_version() -> str:
    import torch

    return ".".join(map(str, torch.cuda.nccl.version()))


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
    digest = file_digest(path)
    known = digest.startswith(WEIGHTS.rsplit("-", 1)[-1].removesuffix(".pth"))
    remedy = "" if known else f"not torch-fidelity's {WEIGHTS}: FIDs from it compare with nobody's"
    yield Line("Inception", f"{path}, sha256 {digest}", remedy)


def file_digest(path: Path) -> str:
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_data() -> Iterator[Line]:
    """The data sets that come along, and the folders where others are looked for."""
    import inspect

    from fmlightning.cli.parser import import_public_classes, subclasses
    from fmlightning.data.images.digits import digits
    from fmlightning.data.module import FlowData

    yield Line("data", f"toys are made; {len(digits()[1])} digits of scikit-learn read")
    import_public_classes()
    for kind in subclasses(FlowData):
        root = inspect.signature(kind).parameters.get("root")
        if root is not None and isinstance(root.default, str | Path):
            there = "there" if Path(root.default).exists() else "not there: --data.root names it"
            yield Line("data", f"{kind.__name__} looks in {root.default}: {there}")


def check_disk(root: Path) -> Iterator[Line]:
    """Whether a checkpoint can be put in place: written, synchronised and renamed."""
    there = next(p for p in (root.absolute(), *root.absolute().parents) if p.exists())
    where = str(root) if there == root.absolute() else f"{root} (to be made in {there})"
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".fmlightning-doctor-") as folder:
            write_and_rename(Path(folder))
    except OSError as error:
        remedy = "name a directory you may write to in $FMLIGHTNING_RUNS or --run_dir"
        yield Line("runs", f"{where}: {error.strerror}", remedy, needed=True)
        return
    free = shutil.disk_usage(there).free
    words = f"{where}: write, fsync and rename work, {free / GB:.0f} GB free"
    yield Line("runs", words, "checkpoints take space: free some" if free < LITTLE_DISK else "")


def write_and_rename(folder: Path) -> None:
    with (folder / "a").open("wb") as file:
        file.write(b"0" * 65536)
        file.flush()
        os.fsync(file.fileno())
    (folder / "a").replace(folder / "b")


def check_training(accelerator: str) -> Iterator[Line]:
    """Train without a break, and again with a `kill -9` in the middle and the same command once more."""
    from fmlightning.cli.resume_check import Failed, TooLate, rehearse

    print("... a short run, killed and resumed ", end="", file=sys.stderr, flush=True)
    try:
        seen = rehearse(accelerator)
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


CHECKS: dict[str, Check] = {
    "fmlightning": check_package,
    "packages": check_packages,
    "imports": check_imports,
    "GPU": check_gpus,
    "CPU": check_cpu,
    "memory": check_memory,
    "processes": check_processes,
    "W&B": check_wandb,
    "Inception": check_inception,
    "data": check_data,
}
