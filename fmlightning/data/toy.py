"""Toy data in the plane."""

import hashlib
from functools import cached_property

import torch

from fmlightning.data.module import FlowData
from fmlightning.data.order import Batch, Order, steps_per_draw
from fmlightning.data.points import PointsFile, Units
from fmlightning.flow.keys import Key
from fmlightning.flow.sources import Source
from fmlightning.flow.toys import Moons


class ToyData(FlowData):
    """A toy distribution, drawn afresh at every step, or a finite sample of it.

    Validation and test are fixed samples of the distribution, drawn from their own keys; of the rows of a file, each
    at most once.

    Args:
        target: the distribution of the data.
        batch_size: samples in a training step, over all processes.
        train_size: size of a finite training set; null draws new points at every step.
        val_size: held-out points for validation; of a file, as many rows as it has for that.
        test_size: held-out points for testing; likewise.
        steps_per_epoch: length of an epoch where the data never ends.
        eval_batch_size: samples in a block of validation or testing.
        seed: of the points and their order; the command line sets it to `seed_everything`.
    """

    def __init__(
        self,
        target: Source = Moons(),  # noqa: B008 - frozen
        batch_size: int = 256,
        train_size: int | None = None,
        val_size: int = 2048,
        test_size: int = 10_000,
        steps_per_epoch: int = 1000,
        eval_batch_size: int = 2048,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        if target.event_shape is None:
            raise ValueError(
                f"data.target={target} has no shape of its own; choose a toy such as Moons"
            )
        for name, size in (("train", train_size), ("val", val_size), ("test", test_size)):
            if size is not None and size < 1:
                raise ValueError(f"data.{name}_size={size} must be at least 1")
        if steps_per_epoch < 1:
            raise ValueError(f"data.steps_per_epoch={steps_per_epoch} must be at least 1")
        self.target, self.trained_on = target, target.part("train")
        self.event_shape = target.event_shape
        sizes = {"val": val_size, "test": test_size, "reference": test_size}
        self.sizes = {split: min(n, self.rows(split) or n) for split, n in sizes.items()}
        self.exhausted = self.sizes["test"] < test_size
        self.endless_steps = steps_per_epoch
        self.cached: tuple[tuple[int, int, int], torch.Tensor] | None = None
        if train_size is not None:
            if train_size > (self.rows("train") or train_size):
                raise ValueError(
                    f"data.train_size={train_size}: {target} has {self.rows('train')} for training; choose at most "
                    "that, or null, which draws from all of them"
                )
            self.order = Order(train_size, batch_size, self.key)
            self.points = self.draw("train", train_size)

    def draw(self, split: str, size: int) -> torch.Tensor:
        """The fixed sample of a split; it does not depend on the seed of the run."""
        if isinstance(part := self.target.part(split), PointsFile):
            return part.points[:size].float()  # which are in random order
        streams = Key(0).fold("toy", split).streams(torch.arange(size))
        return part.sample_keyed(streams, self.event_shape)

    def rows(self, split: str) -> int | None:
        """How many different points a split has; None for no end of them."""
        part = self.target.part(split)
        return len(part.points) if isinstance(part, PointsFile) else None

    @property
    def units(self) -> Units | None:
        return getattr(self.target, "units", None)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.units is None else self.units.to_data(x)

    @cached_property
    def pixel_data(self) -> FlowData:
        """Itself, or the same points in the units of their file."""
        if not isinstance(self.target, PointsFile) or self.units is None:
            return self
        size = None if self.order is None else self.order.size
        data = ToyData(
            self.target.in_data_units(),
            self.batch_size,
            size,
            self.sizes["val"],
            self.sizes["test"],
        )
        data.sizes = self.sizes
        data.attach_to(self)
        return data

    @property
    def splits(self) -> dict[str, str]:
        train = (
            "new points at every step" if self.order is None else f"{self.order.size} fixed points"
        )
        return {
            "train": f"{train} of {self.target}",
            "val": f"{self.sizes['val']} fixed points",
            "test": f"{self.sizes['test']} fixed points",
        }

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr((self.target, self.splits)).encode()).hexdigest()

    @property
    def steps_per_epoch(self) -> int:
        return self.endless_steps if self.order is None else super().steps_per_epoch

    def train_batch(self, step: int, rows: slice) -> Batch:
        if self.order is not None:
            return {"x1": self.points[self.order.indices(step)[rows]]}
        group, place = divmod(step, self.steps_at_once)
        name = (self.key.seed, self.batch_size, group)
        if self.cached is None or self.cached[0] != name:
            self.cached = (name, self.new_points(group))
        return {"x1": self.cached[1][place, rows]}

    @property
    def steps_at_once(self) -> int:
        """Number of steps whose points are drawn at once."""
        return steps_per_draw((self.batch_size, *self.event_shape))

    def new_points(self, group: int) -> torch.Tensor:
        """The points of a group of steps; of all processes, each of which takes its rows."""
        shape = (self.steps_at_once, self.batch_size, *self.event_shape)
        generator = self.key.fold("points", group).generator()
        points = self.trained_on.sample((shape[0] * shape[1], *shape[2:]), generator)
        return points.reshape(shape)

    def eval_samples(self, split: str) -> Batch:
        return {"x1": self.draw(split, self.sizes[split])}

    def require_fixed_set(self) -> None:
        if self.order is None:
            raise ValueError(
                "data.train_size=null draws new points at every step, and SemidiscreteOT pairs x0 with a finite set: "
                "set data.train_size"
            )

    def fixed_set(self) -> Batch:
        return {"x1": self.points}
