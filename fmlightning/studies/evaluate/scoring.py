"""The scores of cells: the model, the data and the metrics that all cells share, and the files of the cells."""

import json
import os
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from rich.progress import Progress
from torch import Tensor

from fmlightning.cli.build import instantiate_data
from fmlightning.cli.device import pick_device, prepare_flow
from fmlightning.cli.init_from import weights_digest
from fmlightning.cli.load import TrainedFlow, away_from, load_flow
from fmlightning.cli.parser import FlowParser
from fmlightning.cli.sampling_options import described, guided
from fmlightning.data.module import FlowData
from fmlightning.data.order import Shard
from fmlightning.flow.guidance import Guidance
from fmlightning.flow.labels import LabelOrder
from fmlightning.flow.paths.affine import AffinePath
from fmlightning.flow.solvers.ode import ODESolver
from fmlightning.flow.solvers.sampling import sample
from fmlightning.flow.solvers.solution import Solution, SolverError
from fmlightning.flow.solvers.solver import TrainedField
from fmlightning.metrics.evaluator import (
    Block,
    Evaluator,
    Scores,
    check_metrics,
    computed,
    evaluate_model,
    fit_reference,
    of_model,
    of_samples,
    provenance,
)
from fmlightning.metrics.metric import FlowMetric
from fmlightning.metrics.solution_error import SolutionError
from fmlightning.metrics.straightness import Straightness
from fmlightning.runs.directory import Run, read_json
from fmlightning.runs.files import atomic_write
from fmlightning.runs.weights import read_weights
from fmlightning.studies.evaluate.grid import Cell, cells
from fmlightning.studies.evaluate.reference import METHOD, Reference

STATES = 17
"""States of a trajectory that are kept; 16 pieces see the bends that straightness is about."""


@dataclass
class Scorer:
    """The model, the data, the metrics and the folder that all cells share."""

    flows: dict[bool, TrainedFlow]
    cells: list[Cell]
    data: FlowData
    metrics: list[FlowMetric]
    folder: Path
    shard: Shard
    device: torch.device
    batch_size: int
    seed: int
    identity: dict[str, Any]
    overwrite: bool
    labels: LabelOrder = "reference"
    reference: Reference | None = None
    guide_model: str | None = None
    path: AffinePath | None = None
    of_model: dict[tuple[bool, Guidance], Scores] = field(default_factory=dict)

    @classmethod
    def open(cls, options: Any, shard: Shard) -> "Scorer":
        """Load the run, and refuse what cannot be scored before anything is generated."""
        run, guide = Run.open(options.run), options.guidance.guide_model
        data = instantiate_data(run.config)
        flows = {ema: load_flow(options.run, ema=ema) for ema in options.ema}
        for ema, loaded in flows.items():
            if loaded.paired:
                flows[ema] = replace(loaded, source=data.source_points)
            if guide:
                flows[ema] = away_from(flows[ema], guide, ema, "--guidance.guide_model")
        flow = next(iter(flows.values()))
        path = options.path
        wanted = cells(flow, options)
        asked = run.config.get("evaluation") or {}
        named = plain(options.metrics) if options.metrics is not None else asked.get("metrics")
        metrics = instantiate_metrics(named or [])
        if not metrics:
            raise ValueError(
                f"{run.path} has no evaluation.metrics: name some with --metrics, such as "
                '--metrics \'[{"class_path": "Wasserstein"}]\''
            )
        device = pick_device(local(options.device))
        data.prepare_data()
        data.setup("test")
        data.default_shard = shard
        check_metrics(metrics, data)
        batch_size = options.batch_size or asked.get("batch_size") or 1024
        seed = flow.seed if options.seed is None else options.seed
        identity = {
            **weights_identity(options.run),
            "seed": seed,
            "batch_size": batch_size,
            "metric_configs": named,
            "provenance": provenance(metrics),
            "data": data.fingerprint,
        }
        labels = label_order(data, options.labels)
        chosen = {
            "labels": labels,
            "precision": options.precision,
            "compile": options.compile or None,
            "path": repr(path) if path else None,
        }
        identity |= {k: v for k, v in chosen.items() if v is not None}
        flows = {
            ema: prepare_flow(f, options.precision, options.compile, device)
            for ema, f in flows.items()
        }
        if path and shard.rank == 0:
            print(described(guided(flow, wanted[0].guidance, path)))
        reference = None
        if options.reference is not None:
            reference = Reference(options.reference, seed)
            identity["reference"] = f"{METHOD}, tol {options.reference:g}"
        return cls(
            flows, wanted, data, metrics, run.path / "evaluations", shard, device, batch_size, seed, identity,
            options.overwrite, labels or "reference", reference,
            weights_identity(guide)["checkpoint"] if guide else None, path,
        )  # fmt: skip

    def records(self) -> list[dict[str, Any]]:
        """The record of each cell, read where it is there and computed where it is not."""
        found = {cell: None if self.overwrite else self.read(cell) for cell in self.cells}
        missing = [cell for cell in self.cells if found[cell] is None]
        if missing:
            fit_reference(self.metrics, self.data.pixel_data, self.device, self.data)
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

    def model_scores(self, field: TrainedField, cell: Cell) -> Scores:
        """The scores of a field whatever the solver, computed once for all cells that follow it."""
        key = (cell.ema, cell.guidance)
        if key not in self.of_model:
            distribution = getattr(self.data, "target", None)
            evaluate_model(self.metrics, field, self.flows[cell.ema].source, distribution)
            self.of_model[key] = computed(of_model(self.metrics))
        return self.of_model[key]

    def compute(self, cell: Cell) -> dict[str, Any]:
        """Generate the samples of a cell and write down their scores, or why there are none."""
        field: Any = guided(self.flows[cell.ema], cell.guidance, self.path)
        record = self.describe(cell)
        try:
            record |= self.scores(field.to(self.device), cell)
        except SolverError as error:
            if self.shard.world_size > 1:
                raise  # the others would wait for this process
            record["error"] = str(error)
        finally:
            for metric in self.metrics:
                metric.reset()
        if self.shard.rank == 0 and "error" not in record:
            self.folder.mkdir(exist_ok=True)
            with atomic_write(self.file(cell)) as file:
                file.write((json.dumps(record, indent=2) + "\n").encode())
        return record

    def scores(self, field: TrainedField, cell: Cell) -> dict[str, Any]:
        """The scores of samples of this field, made as the cell says, and what they cost."""
        flow, metrics = self.flows[cell.ema], of_samples(self.metrics)
        straight, error = Straightness().to(self.device), SolutionError().to(self.device)

        def solve(index: Tensor, y: Tensor | None) -> Solution:
            return sample(
                field, flow.source, cell.solver, index, flow.event_shape, seed=self.seed, y=y, save_at=STATES
            )  # fmt: skip

        def observe(block: Block) -> None:
            assert block.solution is not None
            straight.update(block.solution.states, block.solution.times)
            if self.reference is not None and isinstance(cell.solver, ODESolver):
                ends = self.reference.ends(flow, field, cell, block.index, block.y)
                error.update(block.solution.x, ends)

        evaluator = Evaluator(
            solve,
            self.device,
            self.batch_size,
            partial(self.data.labels, order=self.labels),
            self.data.decode,
            self.data.pixel_data.event_shape,
        )
        total = max((m.num_samples for m in metrics), default=self.batch_size)
        cost = evaluator.update(metrics, total, observe)
        scores = Scores()
        for found in (self.model_scores(field, cell), computed(metrics)):
            scores.add(found.values, found.higher_is_better)
        shape = straight.compute()
        scores.add(shape, dict.fromkeys(shape))
        if self.reference is not None:
            scores.add(error.compute(), {"solver_error": False})
        return {
            "samples": cost.samples,
            "nfe": cost.nfe,
            "seconds_per_sample": cost.seconds / max(cost.samples, 1),
            "metrics": scores.values,
            "higher_is_better": scores.higher_is_better,
        }

    # -- files ------------------------------------------------------------------------------------

    def describe(self, cell: Cell) -> dict[str, Any]:
        """What a record is of: equal settings, equal record."""
        return {
            **self.identity,
            "ema": cell.ema,
            "solver": repr(cell.solver),
            "method": cell.solver.name,
            "budget": cell.budget,
            "guidance": asdict(cell.guidance),
            "label": cell.label,
            **({"guide_model": self.guide_model} if cell.auto else {}),
        }

    def file(self, cell: Cell) -> Path:
        settings = json.dumps(self.describe(cell), sort_keys=True)
        digest = sha256(settings.encode()).hexdigest()[:8]
        budget = cell.budget.replace(" ", "")
        return self.folder / f"{cell.solver.name}-{budget}-w{cell.guidance.scale:g}-{digest}.json"

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """The record of a cell, if it is there whole."""
        try:
            record = read_json(self.file(cell))
        except ValueError:
            return None
        return record if {"metrics", "nfe", "seconds_per_sample"} <= record.keys() else None


def label_order(data: FlowData, given: LabelOrder | None) -> LabelOrder | None:
    """The order of the labels of samples, or None where there is no choice.

    Raises:
        ValueError: one was given all the same.
    """
    if data.num_classes and not data.paired:
        return given or "reference"
    if given:
        reason = "samples have the labels of their x0" if data.paired else "the data have no labels"
        raise ValueError(f"--labels {given} does nothing: {reason}; leave it out")
    return None


def local(device: str) -> str:
    """Each process's own accelerator, where there are several."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if device == "auto" and rank and torch.cuda.is_available() else device


def instantiate_metrics(configs: list[Any]) -> list[FlowMetric]:
    """The metrics of a config."""
    parser = FlowParser()
    parser.add_argument("--metrics", type=list[FlowMetric])
    return parser.instantiate(parser.parse_object({"metrics": deepcopy(configs)})).metrics


def plain(value: Any) -> Any:
    """Parsed options as what JSON has."""
    if isinstance(value, Namespace):
        return value.as_dict()
    return [plain(v) for v in value] if isinstance(value, list) else value


def weights_identity(run: str) -> dict[str, Any]:
    """A digest of weights, raw and averaged, and their step: what a file has besides, a resume may change."""
    found: dict[str, Tensor] = {}
    step = None
    for ema in (False, True):
        with suppress(ValueError):  # it has no such weights
            weights, record = read_weights(run, ema)
            found |= {f"{ema}.{name}": value for name, value in weights.items()}
            step = record.get("step")
    return {"checkpoint": weights_digest(found), "step": step}
