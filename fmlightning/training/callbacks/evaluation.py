"""Scores of generated samples, every so often and at the end."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from fmlightning.data.module import FlowData
from fmlightning.flow.labels import LabelOrder
from fmlightning.metrics.evaluator import (
    Cost,
    Evaluator,
    Scores,
    check_metrics,
    computed,
    evaluate_model,
    fit_reference,
    of_samples,
    provenance,
)
from fmlightning.metrics.metric import FlowMetric
from fmlightning.runs.files import write_text
from fmlightning.training.callbacks.periodic import Periodic
from fmlightning.training.ema.callback import evaluation_weights
from fmlightning.training.lightning.shutdown import stop_if_signalled
from fmlightning.training.module import FlowMatching


class Evaluation(Periodic):
    """Score samples generated with the averaged weights, and the model itself.

    The samples are dealt to the processes in blocks of `batch_size`, so that neither they nor their NFE depend on
    how many processes there are; choose it smaller where else some would have none.
    Scores are logged under `eval/` and written to `evaluation.json` in the run directory; those of `validate` and
    `test`, to a file of that name.

    Args:
        metrics: Wasserstein, Frechet, ... or none.
        every_n_steps: optimiser steps between two evaluations; 0 evaluates at the end only.
        at_end: whether to evaluate at the end of training.
        batch_size: samples generated at once.
        labels: of generated samples: as frequent as in the `reference` data, or `balanced`, each class in turn.
    """

    def __init__(
        self,
        metrics: list[FlowMetric] | None = None,
        every_n_steps: int = 0,
        at_end: bool = True,
        batch_size: int = 2048,
        labels: LabelOrder = "reference",
    ) -> None:
        super().__init__(every_n_steps, at_end)
        if batch_size < 1:
            raise ValueError(f"evaluation.batch_size={batch_size} must be at least 1")
        self.metrics = metrics or []
        self.batch_size, self.labels = batch_size, labels
        self.prepared = False
        self.ending = False

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.ending = True
        super().on_fit_end(trainer, pl_module)

    def check(self, data: FlowData) -> None:
        """Refuse metrics that do not suit the data, before any training."""
        if self.metrics:
            check_metrics(self.metrics, data)

    def run(self, trainer: Trainer, module: FlowMatching, data: FlowData) -> None:
        if not self.metrics:
            return
        scores = self.scores(trainer, module, data).values
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics({f"eval/{k}": v for k, v in scores.items()}, trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "validate" and self.metrics:
            self.at_step(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self.metrics:
            self.at_step(trainer, pl_module)

    def scores(self, trainer: Trainer, module: FlowMatching, data: FlowData) -> Scores:
        """The numbers of every metric, and the NFE of the largest batch."""
        if not self.prepared:
            fit_reference(self.metrics, data.pixel_data, module.device, data)
            self.prepared = True
        with evaluation_weights(trainer, module.network):
            distribution = getattr(data, "target", None)
            evaluate_model(self.metrics, module.field, module.recipe.source, distribution)
        cost = self.generate(trainer, module, data)
        scores = computed(self.metrics)
        scores.add({"nfe": float(cost.nfe)}, {"nfe": None})
        if trainer.is_global_zero:
            self.write(trainer, module, scores)
        return scores

    def generate(self, trainer: Trainer, module: FlowMatching, data: FlowData) -> Cost:
        """Update the metrics with samples: number k is the same on any number of processes."""

        def stop_if_ending() -> None:
            if self.ending:  # the training is saved, and the evaluation can be done again
                stop_if_signalled(trainer)

        evaluator = Evaluator(
            module.generate,
            module.device,
            self.batch_size,
            partial(data.labels, order=self.labels),
            data.decode,
            data.pixel_data.event_shape,
            stop_if_ending,
        )
        metrics = of_samples(self.metrics)
        return evaluator.update(metrics, max((m.num_samples for m in metrics), default=0))

    def write(self, trainer: Trainer, module: FlowMatching, scores: Scores) -> None:
        """The scores with their settings: of training, or of a later evaluation with another solver."""
        training = trainer.state.fn == "fit"
        record = {
            "step": trainer.global_step if training else None,
            "checkpoint": None if training else str(trainer.ckpt_path),
            "solver": repr(module.solver),
            "batch_size": self.batch_size,
            "labels": self.labels if module.num_classes else None,
            "provenance": provenance(self.metrics),
            "metrics": scores.values,
            "higher_is_better": scores.higher_is_better,
        }
        name = "evaluation" if training else str(trainer.state.fn.value)  # type: ignore[union-attr]
        path = Path(trainer.default_root_dir) / f"{name}.json"
        write_text(path, json.dumps(record, indent=2) + "\n")
        if not training:
            values = scores.values.items()
            print("\n".join(f"{name:24} {value:.5g}" for name, value in values))
            print(f"written: {path}")
