"""Images of generated samples beside real ones."""

import torch
from lightning.pytorch import Trainer
from matplotlib.figure import Figure

from fmlightning.data.module import FlowData
from fmlightning.flow.keys import Key
from fmlightning.flow.solvers.sampling import source_points
from fmlightning.metrics.figures import image_grid, restored, scatter
from fmlightning.training.callbacks.periodic import Periodic, save_figure
from fmlightning.training.module import FlowMatching

SPREAD = 2000


class Samples(Periodic):
    """Draw generated samples and log them as an image: a scatter of points or a grid of images.

    Args:
        every_n_steps: optimiser steps between two images; 0 draws one at the end only.
        at_end: whether to draw one at the end of training.
        num_samples: how many; the same ones, by their keys, in every image. Null: 2,000 points or 100 images.
    """

    def __init__(
        self, every_n_steps: int = 0, at_end: bool = True, num_samples: int | None = None
    ) -> None:
        super().__init__(every_n_steps, at_end)
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"samples.num_samples={num_samples} must be at least 1")
        self.num_samples = num_samples

    def run(self, trainer: Trainer, module: FlowMatching, data: FlowData) -> None:
        images = len(data.event_shape) == 3
        if not trainer.is_global_zero or not (images or data.event_shape == (2,)):
            return
        index = torch.arange(self.num_samples or (100 if images else 2000), device=module.device)
        x = data.decode(module.generate(index, data.labels(index)).x)
        if images and data.paired:
            save_figure(trainer, "samples", pairs(data, index, x))
            return
        real = real_like(data.pixel_data, index)
        if images:
            figure = image_grid(x, real, data.class_names)
        else:
            x0 = source_points(module.recipe.source, module.seed, index, data.event_shape)
            figure = scatter(x, real, data.decode(x0))
        save_figure(trainer, "samples", figure)


def pairs(data: FlowData, index: torch.Tensor, x: torch.Tensor) -> Figure:
    """The held-out x0 of each sample, the sample, and the x1 that belongs to that x0."""
    chosen = index.cpu() % len(data.held_out["x1"])
    return restored(data.held_out["x0"][chosen], x, data.held_out["x1"][chosen])


def real_like(data: FlowData, index: torch.Tensor) -> torch.Tensor:
    """As many held-out samples, of the same classes in the same order where there are classes."""
    held_out = data.preview("test", SPREAD)
    y = data.labels(index)
    if y is None:
        order = torch.randperm(len(held_out["x1"]), generator=Key(0).fold("picture").generator())
        return held_out["x1"][order[: len(index)]]
    everyone = torch.arange(len(held_out["y"]))  # stands in for a class without a held-out sample
    found = {int(k): (held_out["y"] == k).nonzero().flatten() for k in y.unique()}
    of_class = {k: rows if len(rows) else everyone for k, rows in found.items()}
    rank = index.cpu() // data.num_classes
    chosen = [
        of_class[k][n % len(of_class[k])] for k, n in zip(y.tolist(), rank.tolist(), strict=True)
    ]
    return held_out["x1"][torch.stack(chosen)]
