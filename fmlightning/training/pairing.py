r"""The x0 of training batches that are paired.

    x1 of a global batch or several, x0 from the source -> coupling -> (x0, x1, y) of this process's rows

Every process solves the same problem and keeps its own rows. All is keyed by the step.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from fmlightning.data.order import Batch
from fmlightning.flow.couplings import Coupling, Potential, SemidiscreteOT
from fmlightning.flow.keys import Key
from fmlightning.flow.sources import Source
from fmlightning.runs.cache import cached
from fmlightning.training.prefetch import Prefetcher


@dataclass(frozen=True)
class PairingContext:
    """What pairing has to know of the run.

    Args:
        key: of training; that of a step is folded from it.
        source: the distribution of x0.
        batch_size: of the global batch.
        rows: this process's rows of it.
        device: where x0 is drawn and pairs are found.
    """

    key: Key
    source: Source
    batch_size: int
    rows: slice
    device: torch.device

    def x0(self, step: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """The source points of a global batch."""
        generator = self.key.fold(step).fold("x0").generator(self.device)
        return self.source.sample((self.batch_size, *shape), generator)

    def pairs_key(self, step: int) -> Key:
        return self.key.fold(step).fold("coupling")


class Pairing(Protocol):
    """Problems that are read and then solved; each gives the batches of `steps` steps."""

    @property
    def steps(self) -> int: ...

    def read(self, number: int) -> tuple[int, Batch]: ...

    def solve(self, problem: tuple[int, Batch]) -> list[Batch]: ...


@dataclass(frozen=True)
class BatchPairing:
    """The points of one global batch, or of several, among themselves.

    Args:
        coupling: how.
        share: what is known of the run.
        batch: this process's rows of x1, and y, of a step.
        gather: the rows of all processes from those of this one.
    """

    coupling: Coupling
    share: PairingContext
    batch: Callable[[int], Batch]
    gather: Callable[[Tensor], Tensor]

    @property
    def steps(self) -> int:
        return max(1, (self.coupling.ot_batch_size or 1) // self.share.batch_size)

    def read(self, number: int) -> tuple[int, Batch]:
        """The global batches of a problem, one after another, each with its x0, and its first step."""
        first = number * self.steps
        parts = [self.whole(step) for step in range(first, first + self.steps)]
        return first, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def whole(self, step: int) -> Batch:
        batch = {name: self.gather(v.to(self.share.device)) for name, v in self.batch(step).items()}
        return {**batch, "x0": self.share.x0(step, batch["x1"].shape[1:])}

    def solve(self, problem: tuple[int, Batch]) -> list[Batch]:
        """This process's rows of each global batch of a problem, paired."""
        first, points = problem
        generator = self.share.pairs_key(first).generator()
        i, j = self.coupling.pairs(points["x0"], points["x1"], points.get("y"), generator)
        size, rows = self.share.batch_size, self.share.rows
        mine = [(i[b][rows], j[b][rows]) for b in torch.arange(len(j), device=j.device).split(size)]
        return [{name: v[i if name == "x0" else j] for name, v in points.items()} for i, j in mine]


@dataclass(frozen=True)
class SetPairing:
    """Each x0 with a point of the whole training set, which its potential finds.

    Args:
        potential: of the training set.
        share: what is known of the run.
    """

    potential: Potential
    share: PairingContext

    steps = 1

    def read(self, number: int) -> tuple[int, Batch]:
        return number, {"x0": self.share.x0(number, self.potential.x1.shape[1:])}

    def solve(self, problem: tuple[int, Batch]) -> list[Batch]:
        """All processes look up all rows: a matrix product of fewer might round to another neighbour."""
        step, points = problem
        generator = self.share.pairs_key(step).generator(self.share.device)
        rows = self.share.rows
        found = self.potential.targets(points["x0"], generator)[rows]
        return [{"x1": self.potential.x1[found], "x0": points["x0"][rows]}]


class PairedBatches:
    """This process's paired batch of a step.

    Args:
        pairing: what pairs them.
        depth: how many problems are solved ahead of the step.
    """

    def __init__(self, pairing: Pairing, depth: int) -> None:
        self.steps = pairing.steps
        self.problems = Prefetcher(pairing.read, pairing.solve, depth)
        self.number, self.batches = -1, list[Batch]()

    def __call__(self, step: int) -> Batch:
        number, place = divmod(step, self.steps)
        if number != self.number:
            self.batches, self.number = self.problems(number), number
        return self.batches[place]

    def close(self) -> None:
        self.problems.close()


class Pairs:
    """The pairs of a run, and the potential of a coupling of the whole set, which goes into its checkpoints.

    Args:
        depth: how many problems are solved ahead of the step.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.potential: Tensor | None = None
        self.potential_of: str | None = None

    def batches(
        self,
        module: LightningModule,
        coupling: Coupling,
        context: PairingContext,
        batch: Callable[[int], Batch],
    ) -> PairedBatches:
        """This process's batches of training, by step, each x1 with the x0 that the coupling gives it.

        Args:
            module: of the run, by whose trainer processes exchange what they have.
            coupling: how points are paired.
            context: what is known of the run.
            batch: this process's x1, and y, of a step.
        """
        if coupling.fitted:
            fitted = self.fitted(module, coupling, context)
            return PairedBatches(SetPairing(fitted, context), self.depth)
        alone = module.trainer.world_size == 1
        gather = (lambda v: v) if alone else partial(gathered, module)
        return PairedBatches(BatchPairing(coupling, context, batch, gather), self.depth)

    def fitted(self, module: LightningModule, coupling: Any, context: PairingContext) -> Potential:
        """The training set with its potential: that of the checkpoint, of the cache, or fitted now."""
        x1 = module.trainer.datamodule.fixed_set()["x1"].to(context.device)  # type: ignore[attr-defined]
        # like the noise of metrics, it does not depend on the seed of the run
        fit = PotentialFit(coupling, x1, context.source, Key(0).fold("potential"))
        if self.potential is None or self.potential_of != fit.digest:

            def broadcast() -> dict[str, Tensor]:
                # the first process's; all fit, so that all see what is wrong
                module.print(f"fitting the potential of {len(fit.x1)} points, once")
                return {"potential": module.trainer.strategy.broadcast(fit.potential())}

            self.potential = cached(fit.name, broadcast, context.device)["potential"]
            self.potential_of = fit.digest
        return coupling.potential(x1, self.potential.to(context.device))

    def save(self, checkpoint: dict[str, Any]) -> None:
        if self.potential is not None:
            checkpoint["potential"], checkpoint["potential_of"] = self.potential, self.potential_of

    def load(self, checkpoint: dict[str, Any]) -> None:
        self.potential = checkpoint.get("potential")
        self.potential_of = checkpoint.get("potential_of")


def gathered(module: LightningModule, rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of the processes."""
    parts: Any = module.all_gather(rows)
    return parts.flatten(0, 1)


@dataclass(frozen=True)
class PotentialFit:
    """The potential of a training set.

    Args:
        coupling: whose potential it is.
        x1: the training set, (N, *S).
        source: the distribution of x0.
        key: of the source points of the fit.
    """

    coupling: SemidiscreteOT
    x1: Tensor
    source: Source
    key: Key

    def potential(self) -> Tensor:
        return self.coupling.fit(self.x1, self.source, self.key)

    @cached_property
    def digest(self) -> str:
        """All that it depends on, but for the device, whose rounding is all that it adds."""
        about = (self.coupling, self.source, self.key, tuple(self.x1.shape), self.x1.dtype)
        digest = hashlib.sha256(repr(about).encode())
        digest.update(self.x1.cpu().contiguous().numpy().data)
        return digest.hexdigest()[:32]

    @property
    def name(self) -> str:
        """Of its file."""
        return f"potential-{self.x1.device.type}-{self.digest}"
