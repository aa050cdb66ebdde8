"""`fmlightning evaluate RUN`: solvers x NFE x guidance, on the same weights and the same noise.

Each combination is a cell: a file in RUN/evaluations, written when its scores are complete. The same command again
reads what is there and computes the rest. The samples of a cell are made once, and every judge sees them.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, distributed

from fmlightning.callbacks.evaluation import check_judges
from fmlightning.cli import instantiate_data, quiet
from fmlightning.data.module import FlowData
from fmlightning.data.order import Shard
from fmlightning.flow.fields import TrainedField
from fmlightning.flow.guidance import Guidance
from fmlightning.flow.ode import ADAPTIVE, FIXED, ODESolver
from fmlightning.flow.sampling import sample
from fmlightning.flow.solution import Solution, SolverError
from fmlightning.metrics.judge import Judge
from fmlightning.metrics.straightness import Straightness
from fmlightning.parser import FlowParser
from fmlightning.plotting import quality
from fmlightning.runs import Run, TrainedFlow, load_flow
from fmlightning.sample import pick_device
from fmlightning.training.sealed import put_in_place

DESCRIPTION = """Score a trained run under many solvers, budgets and guidance scales.

Writes a file a cell, evaluations.json, table.md and nfe.png into RUN/evaluations; the same command again computes
only what is missing. Starts on several processes under torchrun, with the same result."""

ASIDE = ("_std", "_low", "_high", "_floor", "_real")
"""How scores end that stand beside others."""

STATES = 17
"""Times at which trajectories are looked at; 16 pieces see the bends that straightness is about."""


@dataclass(frozen=True)
class Cell:
    """One combination: a solver with its budget, and a guidance."""

    solver: ODESolver
    guidance: Guidance

    @property
    def budget(self) -> str:
        return (
            f"{self.solver.num_steps} steps" if self.solver.fixed else f"tol {self.solver.rtol:g}"
        )

    @property
    def label(self) -> str:
        """The curve this cell lies on."""
        guided = "" if self.guidance.none else f", w = {self.guidance.scale:g}"
        return f"{self.solver.method}{guided}"


def main(argv: list[str]) -> int:
    """Parse the command line, fill in the cells that are missing, and show the table."""
    options = parse(argv)
    with quiet(), processes() as shard:
        bench = Bench.open(options, shard)
        records = bench.records()
        if shard.rank == 0:
            show(bench.folder, records)
    return 0


def parse(argv: list[str]) -> Any:
    parser = FlowParser(
        prog="fmlightning evaluate",
        usage="%(prog)s RUN [--OPTION VALUE ...]",
        description=DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=str, help="Run directory, or a checkpoint in one.")
    parser.add_argument(
        "--solvers",
        type=words,
        default=["euler", "heun2", "dopri5"],
        help="Methods, with commas between.",
    )
    parser.add_argument(
        "--nfe", type=integers, default=[5, 10, 20, 50, 100],
        help="Budgets of the fixed-step methods, in evaluations of the field; each takes as many whole steps as fit.",
    )  # fmt: skip
    parser.add_argument(
        "--tolerances", type=floats, default=[1e-5], help="rtol = atol of the adaptive methods."
    )
    parser.add_argument(
        "--guidance", type=floats, default=None, help="Guidance scales; by default the run's own."
    )
    parser.add_argument(
        "--judges",
        type=list[Judge] | None,
        default=None,
        help="By default evaluation.judges of the run.",
    )
    parser.add_argument(
        "--batch_size",
        type=PositiveInt | None,
        default=None,
        help="Samples at once; by default the run's.",
    )
    parser.add_argument(
        "--seed", type=NonNegativeInt | None, default=None, help="By default the run's."
    )
    parser.add_argument(
        "--ema", type=bool, default=True, help="Averaged weights rather than raw ones."
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps.")
    parser.add_argument("--overwrite", type=bool, default=False, help="Compute all cells again.")
    return parser.parse_args(argv)


def words(text: str | list[Any]) -> list[Any]:
    """What stands between commas; a list is one already."""
    if isinstance(text, list):
        return text
    found = [word.strip() for word in text.strip("[]").split(",")]
    if not all(found):
        raise ValueError(f"{text!r} must be a list with commas between, such as euler,heun2")
    return found


def integers(text: str | list[Any]) -> list[int]:
    return [int(word) for word in words(text)]


def floats(text: str | list[Any]) -> list[float]:
    return [float(word) for word in words(text)]


def cells(flow: TrainedFlow, options: Any) -> list[Cell]:
    """All combinations, in the order of the table.

    Raises:
        ValueError: a method is unknown, or no budget pays for a step of it.
    """
    scales = options.guidance or [flow.guidance.scale]
    guidances = [replace(flow.guidance, scale=w) for w in scales]
    for guidance in guidances:
        flow.guided(guidance)  # refuses a model that was not trained for it
    solvers = [s for method in options.solvers for s in budgets(flow.solver, method, options)]
    return [Cell(solver, guidance) for guidance in guidances for solver in solvers]


def budgets(solver: ODESolver, method: str, options: Any) -> list[ODESolver]:
    """A method at each of its budgets."""
    if method in ADAPTIVE:
        return [replace(solver, method=method, rtol=t, atol=t) for t in options.tolerances]  # type: ignore[arg-type]
    if method not in FIXED:
        raise ValueError(f"--solvers {method}: choose from {', '.join(FIXED + ADAPTIVE)}")
    steps = {whole_steps(replace(solver, method=method), nfe) for nfe in options.nfe} - {0}  # type: ignore[arg-type]
    if not steps:
        raise ValueError(f"--nfe {options.nfe} pays for no step of {method}: choose a larger one")
    return [replace(solver, method=method, num_steps=n) for n in sorted(steps)]  # type: ignore[arg-type]


def whole_steps(solver: ODESolver, nfe: int) -> int:
    """How many steps a number of evaluations pays for."""
    steps = nfe
    while steps > 0 and (replace(solver, num_steps=steps).evaluations or steps) > nfe:
        steps -= 1
    return steps


@contextmanager
def processes() -> Iterator[Shard]:
    """This process among those of torchrun, or alone."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        yield Shard()
        return
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Shard(distributed.get_rank(), world_size)
    finally:
        distributed.destroy_process_group()


@dataclass
class Bench:
    """What all cells share: the model, the data, the judges and where the files go."""

    flow: TrainedFlow
    cells: list[Cell]
    data: FlowData
    judges: list[Judge]
    folder: Path
    shard: Shard
    device: torch.device
    batch_size: int
    seed: int
    identity: dict[str, Any]
    overwrite: bool
    of_model: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, options: Any, shard: Shard) -> "Bench":
        """Load the run, and refuse what cannot be scored before anything is generated."""
        run = Run.open(options.run)
        flow, data = load_flow(options.run, ema=options.ema), instantiate_data(run.config)
        if flow.paired:
            flow = replace(flow, source=data.starts)
        wanted = cells(flow, options)
        asked = run.config.get("evaluation") or {}
        named = plain(options.judges) if options.judges is not None else asked.get("judges")
        judges = instantiate_judges(named or [])
        if not judges:
            raise ValueError(
                f"{run.path} has no evaluation.judges: name some with --judges, such as "
                '--judges \'[{"class_path": "Wasserstein"}]\''
            )
        device = pick_device(local(options.device))
        data.prepare_data()
        data.setup("test")
        data.processes = shard
        check_judges(judges, data)
        batch_size = options.batch_size or asked.get("batch_size") or 1024
        seed = flow.seed if options.seed is None else options.seed
        identity = {
            "checkpoint": checkpoint_digest(options.run),
            "ema": options.ema,
            "seed": seed,
            "batch_size": batch_size,
            "judges": named,
            "rests_on": {k: v for judge in judges for k, v in judge.rests_on().items()},
            "data": data.fingerprint,
        }
        return cls(
            flow, wanted, data, judges, run.path / "evaluations", shard, device, batch_size, seed, identity,
            options.overwrite,
        )  # fmt: skip

    def records(self) -> list[dict[str, Any]]:
        """The record of each cell, read where it is there and computed where it is not."""
        found = {cell: None if self.overwrite else self.read(cell) for cell in self.cells}
        missing = [cell for cell in self.cells if found[cell] is None]
        if missing:
            self.prepare()
        with Progress(disable=self.shard.rank > 0) as progress:
            task = progress.add_task("evaluating", total=len(missing))
            for cell in missing:
                progress.update(task, description=f"{cell.label}, {cell.budget}")
                found[cell] = self.compute(cell)
                progress.advance(task)
        return [record for record in found.values() if record is not None]

    def prepare(self) -> None:
        """Show the judges the real samples."""
        for judge in self.judges:
            judge.to(self.device)
            judge.meet(self.data.seen)
        law, model = getattr(self.data, "target", None), self.flow.field.to(self.device)
        for judge in self.judges:
            if (
                not judge.num_samples
            ):  # it scores the model, whatever the solver and without guidance
                judge.look(model, self.flow.source, law, self.shard.rank, self.shard.world_size)
                self.of_model |= judge.compute()

    def compute(self, cell: Cell) -> dict[str, Any]:
        """Generate the samples of a cell and write down their scores, or why there are none."""
        guided: Any = self.flow.guided(cell.guidance)
        record = self.describe(cell)
        try:
            record |= self.scores(guided.to(self.device), cell.solver)
        except SolverError as error:
            if self.shard.world_size > 1:
                raise  # the others would wait for this process
            record["error"] = str(error)
        finally:
            for judge in self.judges:
                judge.reset()
        if self.shard.rank == 0 and "error" not in record:
            self.folder.mkdir(exist_ok=True)
            with put_in_place(self.file(cell)) as file:
                file.write((json.dumps(record, indent=2) + "\n").encode())
        return record

    def scores(self, field: TrainedField, solver: ODESolver) -> dict[str, Any]:
        """What the judges say of samples of this field by this solver."""
        straight, nfe, seconds = Straightness().to(self.device), 0, 0.0
        judges = [judge for judge in self.judges if judge.num_samples]
        total = max((judge.num_samples for judge in judges), default=self.batch_size)
        for start in range(0, total, self.batch_size * self.shard.world_size):
            first = start + self.shard.rank * self.batch_size
            index = torch.arange(
                first, max(first, min(first + self.batch_size, total)), device=self.device
            )
            y = self.data.labels(index)
            x = torch.zeros(0, *self.data.seen.event_shape, device=self.device)
            if len(index):
                began = self.now()
                solution = self.generate(field, solver, index, y)
                seconds += self.now() - began
                straight.update(solution.states, solution.times)
                x, nfe = self.data.decode(solution.x), max(nfe, solution.nfe)
            for judge in judges:
                mine = index < judge.num_samples
                judge.update(x[mine], index[mine], None if y is None else y[mine])
        metrics = dict(self.of_model)
        for judge in judges:
            metrics |= judge.compute()
        metrics |= straight.compute()
        nfe, seconds = int(self.over_all(nfe, "max")), self.over_all(seconds, "sum")
        return {
            "samples": total,
            "nfe": nfe,
            "seconds_per_sample": seconds / max(total, 1),
            "metrics": metrics,
        }

    def generate(
        self, field: TrainedField, solver: ODESolver, index: Tensor, y: Tensor | None
    ) -> Solution:
        solution = sample(
            field, self.flow.source, solver, index, self.flow.event_shape,
            seed=self.seed, y=y, save_at=STATES,
        )  # fmt: skip
        if bool(solution.failed.any()):
            raise SolverError(
                f"{int(solution.failed.sum())} of {len(index)} samples could not be integrated"
            )
        return solution

    def now(self) -> float:
        """The time when the device has done what it was told."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def over_all(self, value: float, how: str) -> float:
        """A number over all processes."""
        if self.shard.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total, getattr(distributed.ReduceOp, how.upper()))
        return float(total)

    # -- files ------------------------------------------------------------------------------------

    def describe(self, cell: Cell) -> dict[str, Any]:
        """What a record is of: equal settings, equal record."""
        return {
            **self.identity,
            "solver": repr(cell.solver),
            "method": cell.solver.method,
            "budget": cell.budget,
            "guidance": asdict(cell.guidance),
            "label": cell.label,
        }

    def file(self, cell: Cell) -> Path:
        settings = json.dumps(self.describe(cell), sort_keys=True)
        digest = sha256(settings.encode()).hexdigest()[:8]
        budget = cell.budget.replace(" ", "")
        return self.folder / f"{cell.solver.method}-{budget}-w{cell.guidance.scale:g}-{digest}.json"

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """The record of a cell, if it is there whole."""
        try:
            return json.loads(self.file(cell).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None


def local(device: str) -> str:
    """Each process's own accelerator, where there are several."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if device == "auto" and rank and torch.cuda.is_available() else device


def instantiate_judges(configs: list[Any]) -> list[Judge]:
    """The judges of a config."""
    parser = FlowParser()
    parser.add_argument("--judges", type=list[Judge])
    return parser.instantiate(parser.parse_object({"judges": deepcopy(configs)})).judges


def plain(value: Any) -> Any:
    """Parsed options as what JSON has."""
    if isinstance(value, Namespace):
        return value.as_dict()
    return [plain(v) for v in value] if isinstance(value, list) else value


def checkpoint_digest(run: str) -> str:
    path = Path(run)
    file = path if path.suffix == ".ckpt" else Run.open(path).checkpoint()
    return sha256(file.read_bytes()).hexdigest()


# -- the table and the figure ---------------------------------------------------------------------


def show(folder: Path, records: list[dict[str, Any]]) -> None:
    """Print the table; write it, the records and the figure."""
    folder.mkdir(exist_ok=True)
    rows = table(records)
    printed = Table(*rows[0], box=None)
    for row in rows[1:]:
        printed.add_row(*row)
    Console(width=None if os.isatty(1) else 200).print(printed)
    (folder / "table.md").write_text(markdown(rows))
    (folder / "evaluations.json").write_text(json.dumps(records, indent=2) + "\n")
    done = [r for r in records if "error" not in r]
    for record in records:
        if "error" in record:
            print(f"{record['label']}, {record['budget']}: {record['error']}")
    if done:
        quality(done, headline(done)).savefig(folder / "nfe.png", dpi=130)
    print(f"written: {folder}/table.md, evaluations.json, nfe.png")


def headline(records: list[dict[str, Any]]) -> list[str]:
    """The scores that differ between cells, without their spreads."""
    names = [n for n in records[0]["metrics"] if not n.endswith(ASIDE)]
    return [n for n in names if n not in ("path_energy", "transport_cost", "straightness")]


def table(records: list[dict[str, Any]]) -> list[list[str]]:
    """A header and a row for each cell."""
    done = [r for r in records if "error" not in r]
    names = [n for n in (done[0]["metrics"] if done else {}) if not n.endswith(ASIDE)]
    rows = [["solver", "budget", "NFE", "w", *names, "ms/sample"]]
    for r in records:
        start = [r["method"], r["budget"]]
        scale = f"{r['guidance']['scale']:g}"
        if "error" in r:
            rows.append([*start, "-", scale, *("failed" for _ in names), "-"])
            continue
        scores = [f"{r['metrics'][n]:.4g}" for n in names]
        rows.append([*start, str(r["nfe"]), scale, *scores, f"{1e3 * r['seconds_per_sample']:.3g}"])
    return rows


def markdown(rows: list[list[str]]) -> str:
    """Rows as a table of Markdown."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
