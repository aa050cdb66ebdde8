"""Scores of generated samples, every so often and at the end."""

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from fmlightning.data.module import FlowData
from fmlightning.flow.solvers.solution import Solution, SolverError
from fmlightning.metrics.metric import Judge
from fmlightning.runs.files import write_text
from fmlightning.training.callbacks.periodic import Periodic
from fmlightning.training.ema.callback import evaluation_weights
from fmlightning.training.lightning.shutdown import stop_if_signalled
from fmlightning.training.module import FlowMatching


class Evaluation(Periodic):
    """Generate keyed samples with the averaged weights and let judges score them.

    The samples are dealt to the processes in blocks of `batch_size`, so that neither they nor their NFE depend on
    how many processes there are; choose it smaller where else some would have none.
    Scores are logged under `eval/` and written to `evaluation.json` in the run directory; those of `validate` and
    `test`, to a file of that name.

    Args:
        judges: Wasserstein, Frechet, ... or none.
        every_n_steps: optimiser steps between two evaluations; 0 evaluates at the end only.
        at_end: whether to evaluate at the end of training.
        batch_size: samples generated at once.
    """

    def __init__(
        self,
        judges: list[Judge] | None = None,
        every_n_steps: int = 0,
        at_end: bool = True,
        batch_size: int = 2048,
    ) -> None:
        super().__init__(every_n_steps, at_end)
        if batch_size < 1:
            raise ValueError(f"evaluation.batch_size={batch_size} must be at least 1")
        self.judges = judges or []
        self.batch_size = batch_size
        self.prepared = False
        self.ending = False

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.ending = True
        super().on_fit_end(trainer, pl_module)

    def check(self, data: FlowData) -> None:
        """Refuse judges that do not suit the data, before any training."""
        if self.judges:
            check_judges(self.judges, data)

    def run(self, trainer: Trainer, module: FlowMatching, data: FlowData) -> None:
        if not self.judges:
            return
        scores = self.scores(trainer, module, data)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics({f"eval/{k}": v for k, v in scores.items()}, trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "validate" and self.judges:
            self.at_step(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self.judges:
            self.at_step(trainer, pl_module)

    def scores(self, trainer: Trainer, module: FlowMatching, data: FlowData) -> dict[str, float]:
        """Every judge's numbers, and the NFE of the largest batch."""
        self.prepare(module, data)
        self.look(trainer, module, data)
        nfe = self.generate(trainer, module, data)
        scores: dict[str, float] = {}
        for judge in self.judges:
            scores |= judge.compute()
            judge.reset()
        scores["nfe"] = float(nfe)
        if trainer.is_global_zero:
            self.write(trainer, module, scores)
        return scores

    def write(self, trainer: Trainer, module: FlowMatching, scores: dict[str, float]) -> None:
        """The scores with what they are of: of training, or of a later look with another solver."""
        training = trainer.state.fn == "fit"
        record = {
            "step": trainer.global_step if training else None,
            "checkpoint": None if training else str(trainer.ckpt_path),
            "solver": repr(module.solver),
            "batch_size": self.batch_size,
            "rests_on": {k: v for judge in self.judges for k, v in judge.rests_on().items()},
            "metrics": scores,
        }
        name = "evaluation" if training else str(trainer.state.fn.value)  # type: ignore[union-attr]
        path = Path(trainer.default_root_dir) / f"{name}.json"
        write_text(path, json.dumps(record, indent=2) + "\n")
        if not training:
            print("\n".join(f"{name:24} {value:.5g}" for name, value in scores.items()))
            print(f"written: {path}")

    def prepare(self, module: FlowMatching, data: FlowData) -> None:
        if self.prepared:
            return
        for judge in self.judges:
            judge.to(module.device)
            judge.meet(data.seen)
        self.prepared = True

    def look(self, trainer: Trainer, module: FlowMatching, data: FlowData) -> None:
        """Show every judge the model itself."""
        law = getattr(data, "target", None)
        with evaluation_weights(trainer, module.network):
            for judge in self.judges:
                judge.look(
                    module.field, module.source, law, trainer.global_rank, trainer.world_size
                )

    def generate(self, trainer: Trainer, module: FlowMatching, data: FlowData) -> int:
        """Show every judge its samples: number k is the same on any number of processes."""
        total = max(judge.num_samples for judge in self.judges)
        index = torch.arange(total, device=module.device)
        shard, nfe = data.shard, 0
        for first in range(0, total, self.batch_size * shard.world_size):
            if self.ending:  # the training is saved, and the evaluation can be done again
                stop_if_signalled(trainer)
            start = first + shard.rank * self.batch_size
            block = index[start : start + self.batch_size]
            nfe = max(nfe, self.show(module, data, block))
        return int(
            trainer.strategy.reduce(torch.tensor(nfe, device=module.device), reduce_op="max")
        )

    def show(self, module: FlowMatching, data: FlowData, block: torch.Tensor) -> int:
        """Generate some samples for the judges; with none, say so, as a process with no share has to."""
        y, nfe = data.labels(block), 0
        x = torch.zeros(0, *data.seen.event_shape, device=module.device)
        if len(block):
            solution = module.generate(block, y)
            x, nfe = data.decode(solution.x), solution.nfe
            require_all(solution, block)
        for judge in self.judges:
            mine = block < judge.num_samples
            if judge.num_samples:
                judge.update(x[mine], block[mine], None if y is None else y[mine])
        return nfe


def check_judges(judges: list[Judge], data: FlowData) -> None:
    """Refuse judges that do not suit the data.

    Raises:
        ValueError: one of them says so, or scores the density of latents as if it were that of images.
    """
    held_out = data.seen.outline("test")
    for judge in judges:
        judge.check(held_out["x1"], held_out.get("y"), data.levels)
        if not judge.num_samples and data.seen.event_shape != data.event_shape:
            raise ValueError(
                f"evaluation.judges: {type(judge).__name__} scores the model on images, and this one is of the latents "
                f"of {type(data).__name__}; take judges of samples, such as Frechet"
            )


def require_all(solution: Solution, index: torch.Tensor) -> None:
    """Refuse to score what is left where samples failed: the others are not a sample of the model.

    Raises:
        SolverError: some failed.
    """
    failed = index[solution.failed].tolist()
    if failed:
        raise SolverError(
            f"{len(failed)} of {len(index)} samples could not be integrated (numbers {failed[:5]}), so they are not "
            "scored: loosen model.solver's tolerances, or use a fixed-step method"
        )
