"""Images of the way from source to data."""

import torch
from lightning.pytorch import Trainer

from fmlightning.data.module import FlowData
from fmlightning.flow.keys import Key
from fmlightning.flow.shapes import Field
from fmlightning.metrics.figures import path_film, strips, trajectories
from fmlightning.training.callbacks.periodic import Periodic, save_figure
from fmlightning.training.ema.callback import evaluation_weights
from fmlightning.training.module import FlowMatching


class Trajectories(Periodic):
    """Draw how samples move.

    In the plane: particles with their paths, streamlines over the density of the data, and a film of the
    model's density over that of the probability path. Images: strips over time.

    Args:
        every_n_steps: optimiser steps between two images; 0 draws one at the end only.
        at_end: whether to draw one at the end of training.
        num_times: frames of the film or of a strip, both ends included.
    """

    def __init__(self, every_n_steps: int = 0, at_end: bool = True, num_times: int = 7) -> None:
        super().__init__(every_n_steps, at_end)
        if num_times < 2:
            raise ValueError(
                f"trajectories.num_times={num_times} must be at least 2, for both ends"
            )
        self.num_times = num_times

    def run(self, trainer: Trainer, module: FlowMatching, data: FlowData) -> None:
        images = len(data.event_shape) == 3
        if not trainer.is_global_zero or not (images or data.event_shape == (2,)):
            return
        if images:
            self.draw_strips(trainer, module, data)
        else:
            self.draw_plane(trainer, module, data)

    def draw_strips(self, trainer: Trainer, module: FlowMatching, data: FlowData) -> None:
        index = torch.arange(data.num_classes or 8, device=module.device)
        solution = module.generate(index, data.labels(index), self.num_times)
        frames = [data.decode(frame) for frame in solution.states]
        save_figure(trainer, "trajectories", strips(torch.stack(frames), solution.times))

    def draw_plane(self, trainer: Trainer, module: FlowMatching, data: FlowData) -> None:
        index = torch.arange(20_000, device=module.device)
        low, high = module.t_range
        film = [low + (high - low) * k / (self.num_times - 1) for k in range(self.num_times)]
        paths = data.decode(module.generate(index[:1000], save_at=60).states)
        solution = module.generate(index, save_at=film)
        real = data.eval_samples("test")["x1"].to(module.device)
        with evaluation_weights(trainer, module.network):
            field = in_units(module.field, data)
            figure = trajectories(paths, data.decode(real), field, time=(low + high) / 2)
        save_figure(trainer, "trajectories", figure)
        truth = data.decode(self.on_path(module, real, film))
        save_figure(trainer, "path", path_film(data.decode(solution.states), solution.times, truth))

    @staticmethod
    def on_path(module: FlowMatching, x1: torch.Tensor, times: list[float]) -> torch.Tensor:
        """Samples of the probability path at some times, under the coupling of training, (K, N, 2)."""
        streams = Key(0).fold("film").streams(torch.arange(len(x1), device=x1.device))
        pair = module.held_out.of(x1, None, streams)
        frames = [pair._replace(times=torch.full_like(pair.times, t)) for t in times]
        return torch.stack([frame.on(module.recipe.path).xt for frame in frames])


def in_units(field: Field, data: FlowData) -> Field:
    """The field as it moves points in the units of the data."""
    if (units := data.units) is None:
        return field
    return lambda x, t: x.new_tensor(units.std) * field(units.from_data(x), t)
