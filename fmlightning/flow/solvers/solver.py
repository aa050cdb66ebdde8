"""The solver of a model: from source points to samples."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol, runtime_checkable

from fmlightning.flow.keys import KeyedStreams
from fmlightning.flow.paths.affine import AffinePath
from fmlightning.flow.paths.schedules import Schedule
from fmlightning.flow.shapes import Field, Labels, Points, Times, at
from fmlightning.flow.solvers.solution import Solution


@runtime_checkable
class TrainedField(Protocol):
    """A velocity field that knows its path: where it exists, where sampling starts and how it ends."""

    schedule: Schedule
    interval: tuple[float, float]

    def given(self, y: Labels | None) -> Field: ...

    def data(self, x: Points, t: Times, y: Labels | None = None) -> Points: ...


class Solver(ABC):
    """The way from source points to samples. A new solver is a frozen dataclass with `sample` and `refined`."""

    needs: ClassVar[frozenset[str]] = frozenset({"velocity"})
    """The offers of a model that the solver uses."""

    @abstractmethod
    def sample(
        self,
        model: TrainedField,
        x0: Points,
        *,
        y: Labels | None = None,
        t0: float | None = None,
        t1: float | None = None,
        save_at: int | Sequence[float] = 0,
        noise: Points | None = None,
        streams: KeyedStreams | None = None,
    ) -> Solution:
        """Carry source points to the data.

        The start is sigma(t0) x0 + gamma(t0) noise, the path without its data. Where the integration stops short of
        t = 1, one more evaluation returns the data point that the model expects there; it is counted in the NFE.

        Args:
            model: the field, with its path.
            x0: source points, (B, *S).
            y: class labels, (B,).
            t0: where the integration starts; by default where the interval of the model does.
            t1: where it stops; by default where the interval of the model does.
            save_at: states to return: a number of equally spaced times from t0 to t1, or the times themselves.
            noise: standard normal noise for a path with gamma > 0, (B, *S), as from `path_noise`.
            streams: keyed streams of the samples, for solvers that draw; apart from those that drew x0.

        Raises:
            SolverError: the integration failed.
            ValueError: the model does not offer what the solver needs.
        """

    @abstractmethod
    def refined(self) -> "Solver":
        """The solver that checks this one."""

    @property
    def name(self) -> str:
        """The name in tables."""
        return type(self).__name__

    @property
    def fixed(self) -> bool:
        """Whether the steps are set beforehand."""
        return True

    @property
    def evaluations(self) -> int | None:
        """The NFE of the integration where it is known beforehand, else None."""
        return None


def ends(model: TrainedField, t0: float | None, t1: float | None) -> tuple[float, float]:
    """The times of an integration: the interval of the model, unless others are given."""
    low, high = model.interval
    return low if t0 is None else t0, high if t1 is None else t1


def path_start(model: TrainedField, x0: Points, t0: float, noise: Points | None) -> Points:
    """The state at t0: the path of the model without its data."""
    return AffinePath(model.schedule).start(x0, t0, noise)


def finish(model: TrainedField, solution: Solution, t1: float, y: Labels | None) -> Solution:
    """The solution with the expected data point for its end, by one more evaluation where t1 < 1."""
    if t1 == 1:
        return solution
    x1 = model.data(solution.x, at(t1, like=solution.x), y)
    return Solution(x1, solution.nfe + 1, solution.times, solution.states)
