"""Scores of generated samples, every so often and at the end."""

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from fmlightning.callbacks.periodic import Periodic
from fmlightning.data.module import FlowData
from fmlightning.data.order import shared_blocks
from fmlightning.metrics.judge import Judge
from fmlightning.training.ema import evaluation_weights
from fmlightning.training.module import FlowMatching


class Evaluation(Periodic):
    """Generate keyed samples with the averaged weights and let judges score them.

    The samples are shared out over the processes by number, so the scores do not depend on how many there are.
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

    def check(self, data: FlowData) -> None:
        """Refuse judges that do not suit the data, before any training."""
        if self.judges:
            held_out = data.eval_samples("test")
            for judge in self.judges:
                judge.check(held_out["x1"], held_out.get("y"), data.levels)

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
            "metrics": scores,
        }
        name = "evaluation" if training else str(trainer.state.fn.value)  # type: ignore[union-attr]
        path = Path(trainer.default_root_dir) / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n")
        if not training:
            print("\n".join(f"{name:24} {value:.5g}" for name, value in scores.items()))
            print(f"written: {path}")

    def prepare(self, module: FlowMatching, data: FlowData) -> None:
        if self.prepared:
            return
        reference, held_out = data.eval_samples("reference"), data.eval_samples("test")
        labels = (reference["y"], held_out["y"]) if "y" in held_out else None
        for judge in self.judges:
            judge.prepare(reference["x1"], held_out["x1"], labels, data.levels)
            judge.to(module.device)
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
        nfe = 0
        blocks = shared_blocks(index, self.batch_size, data.shard) if total else ()
        for block in blocks:
            y = data.labels(block)
            solution = module.generate(block, y)
            nfe = max(nfe, solution.nfe)
            for judge in self.judges:
                mine = (
                    block < judge.num_samples
                )  # perhaps none: a process with no share must still say so
                judge.update(solution.x[mine], block[mine], None if y is None else y[mine])
        return nfe
