"""The score of a flow, and when it follows from the velocity."""

from fmlightning.flow.paths.predictions import require_finite, to_endpoints
from fmlightning.flow.paths.schedules import Schedule
from fmlightning.flow.shapes import Points, Times, expand_like
from fmlightning.flow.sources import Source


def score(v: Points, x: Points, t: Times, schedule: Schedule) -> Points:
    """grad log p_t(x) from the velocity at x, for a Gaussian source independent of the data.

    Raises:
        ValueError: the score does not exist at t.
    """
    return noise_to_score(to_endpoints("velocity", v, x, t, schedule).x0, t, schedule)


def noise_to_score(x0: Points, t: Times, schedule: Schedule) -> Points:
    """score = -x0 / std.

    Raises:
        ValueError: no noise is left at t.
    """
    std = schedule.std(t)
    require_finite("noise", "score", schedule, t, 1 / std)
    return -x0 / expand_like(std, x0)


def require_score(source: Source | None, independent: bool) -> None:
    """Refuse a source or coupling under which the score does not follow from the velocity."""
    if source is None:
        raise ValueError(
            "the score follows from a velocity for a Gaussian source independent of the data only, and this field "
            "was not told of its source: NetworkField(..., source=Gaussian(), independent=True) if it was trained so"
        )
    if not source.gaussian:
        raise ValueError(
            f"source {source} is not Gaussian: the score does not follow from the velocity, and no SDE is known to "
            "share its marginals. Use the Gaussian source, or an ODE solver, which needs no score."
        )
    if not independent:
        raise ValueError(
            "independent=False: under a coupling of x0 and x1, such as optimal transport, the score does not "
            "follow from the velocity. Train with the independent coupling, or use an ODE solver."
        )
