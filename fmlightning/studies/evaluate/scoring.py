"""The scoring itself: the model, the data and the judges, and the files of the cells."""

import json
import os
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from rich.progress import Progress
from torch import Tensor, distributed

from fmlightning.cli.build import instantiate_data
from fmlightning.cli.device import pick_device, prepare_flow
from fmlightning.cli.load import TrainedFlow, away_from, load_flow
from fmlightning.cli.parser import FlowParser
from fmlightning.data.module import FlowData
from fmlightning.data.order import Shard
from fmlightning.flow.guidance import Guidance
from fmlightning.flow.models import TrainedField
from fmlightning.flow.solvers.sampling import sample
from fmlightning.flow.solvers.solution import Solution, SolverError
from fmlightning.metrics.metric import Judge
from fmlightning.metrics.solution_error import SolutionError
from fmlightning.metrics.straightness import Straightness
from fmlightning.runs.directory import Run
from fmlightning.runs.files import atomic_write
from fmlightning.runs.weights import weights_file
from fmlightning.studies.evaluate.grid import Cell, cells
from fmlightning.studies.evaluate.reference import METHOD, Reference
from fmlightning.training.callbacks.evaluation import check_judges

STATES = 17
"""Times at which trajectories are looked at; 16 pieces see the bends that straightness is about."""


@dataclass
class Scorer:
    """What all cells share: the model, the data, the judges and where the files go."""

    flows: dict[bool, TrainedFlow]
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
    reference: Reference | None = None
    weaker: str | None = None
    of_field: dict[tuple[bool, Guidance], dict[str, float]] = field(default_factory=dict)

    @classmethod
    def open(cls, options: Any, shard: Shard) -> "Scorer":
        """Load the run, and refuse what cannot be scored before anything is generated."""
        run = Run.open(options.run)
        data = instantiate_data(run.config)
        flows = {ema: load_flow(options.run, ema=ema) for ema in options.ema}
        for ema, loaded in flows.items():
            if loaded.paired:
                flows[ema] = replace(loaded, source=data.starts)
            if options.weaker:
                flows[ema] = away_from(flows[ema], options.weaker, ema, "--weaker")
        flow = next(iter(flows.values()))
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
            "checkpoint": weights_digest(options.run),
            "seed": seed,
            "batch_size": batch_size,
            "judges": named,
            "rests_on": {k: v for judge in judges for k, v in judge.rests_on().items()},
            "data": data.fingerprint,
        }
        asked_of_network = {"precision": options.precision, "compile": options.compile or None}
        identity |= {k: v for k, v in asked_of_network.items() if v is not None}
        flows = {
            ema: prepare_flow(f, options.precision, options.compile, device)
            for ema, f in flows.items()
        }
        reference = None
        if options.reference is not None:
            reference = Reference(options.reference, seed)
            identity["reference"] = f"{METHOD}, tol {options.reference:g}"
        return cls(
            flows, wanted, data, judges, run.path / "evaluations", shard, device, batch_size, seed, identity,
            options.overwrite, reference, weights_digest(options.weaker) if options.weaker else None,
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
        return [
            r | {"grid": cell.grid, "file": self.file(cell).name}
            for cell, r in found.items()
            if r is not None
        ]

    def prepare(self) -> None:
        """Show the judges the real samples."""
        for judge in self.judges:
            judge.to(self.device)
            judge.meet(self.data.seen)

    def without_samples(self, field: TrainedField, cell: Cell) -> dict[str, float]:
        """What the judges of a field say of it whatever the solver, once for all cells that follow it."""
        key = (cell.ema, cell.guidance)
        found: dict[str, float] = {}
        if key not in self.of_field:
            law, source = getattr(self.data, "target", None), self.flows[cell.ema].source
            for judge in self.judges:
                if not judge.num_samples:
                    judge.look(field, source, law, self.shard.rank, self.shard.world_size)
                    found |= judge.compute()
                    judge.reset()
            self.of_field[key] = found
        return self.of_field[key]

    def compute(self, cell: Cell) -> dict[str, Any]:
        """Generate the samples of a cell and write down their scores, or why there are none."""
        guided: Any = self.flows[cell.ema].guided(cell.guidance)
        record = self.describe(cell)
        try:
            record |= self.scores(guided.to(self.device), cell)
        except SolverError as error:
            if self.shard.world_size > 1:
                raise  # the others would wait for this process
            record["error"] = str(error)
        finally:
            for judge in self.judges:
                judge.reset()
        if self.shard.rank == 0 and "error" not in record:
            self.folder.mkdir(exist_ok=True)
            with atomic_write(self.file(cell)) as file:
                file.write((json.dumps(record, indent=2) + "\n").encode())
        return record

    def scores(self, field: TrainedField, cell: Cell) -> dict[str, Any]:
        """What the judges say of samples of this field, as the cell has it."""
        straight, nfe, seconds = Straightness().to(self.device), 0, 0.0
        error = SolutionError().to(self.device)
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
                solution = self.generate(field, cell, index, y)
                seconds += self.now() - began
                straight.update(solution.states, solution.times)
                if self.reference is not None:
                    flow = self.flows[cell.ema]
                    error.update(solution.x, self.reference.ends(flow, field, cell, index, y))
                x, nfe = self.data.decode(solution.x), max(nfe, solution.nfe)
            for judge in judges:
                mine = index < judge.num_samples
                judge.update(x[mine], index[mine], None if y is None else y[mine])
        metrics = dict(self.without_samples(field, cell))
        for judge in judges:
            metrics |= judge.compute()
        metrics |= straight.compute() | (error.compute() if self.reference else {})
        nfe, seconds = int(self.over_all(nfe, "max")), self.over_all(seconds, "sum")
        return {
            "samples": total,
            "nfe": nfe,
            "seconds_per_sample": seconds / max(total, 1),
            "metrics": metrics,
        }

    def generate(
        self, field: TrainedField, cell: Cell, index: Tensor, y: Tensor | None
    ) -> Solution:
        flow = self.flows[cell.ema]
        solution = sample(
            field, flow.source, cell.solver, index, flow.event_shape,
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
            "ema": cell.ema,
            "solver": repr(cell.solver),
            "method": cell.solver.method,
            "budget": cell.budget,
            "guidance": asdict(cell.guidance),
            "label": cell.label,
            **({"weaker": self.weaker} if cell.auto else {}),
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


def weights_digest(run: str) -> str:
    """A digest of the file that weights come from."""
    return sha256(weights_file(run).read_bytes()).hexdigest()
