"""Figures of a report: what stands where, and that a solver or a path looks the same everywhere."""

import pytest
from paper_runs import write_cell, write_run

from fmlightning.flow.paths.affine import AffinePath
from fmlightning.metrics.style import FIXED, in_words, looks
from fmlightning.studies.report.cells import cells_of
from fmlightning.studies.report.figures import against_nfe, quality, training
from fmlightning.studies.report.reading import collect
from fmlightning.studies.report.records import EVALUATIONS, FINAL

BUDGETS = (4, 8, 16, 32)


@pytest.fixture
def found(tmp_path):
    for path in ("Linear", "Trigonometric"):
        for seed in (0, 1, 2):
            steps = [(k, 10.0 ** (-k / 10) + seed / 100) for k in range(30)]
            run = write_run(tmp_path / f"{path}-s{seed}", seed, {"w2": 0.1}, path=path, steps=steps)
            for method in ("euler", "heun2"):
                for nfe in BUDGETS:
                    write_cell(run, method, nfe, {"w2": 1 / nfe + seed / 1000}, seed=seed)
            write_cell(run, "dopri5", 350, {"w2": 0.02 + seed / 1000}, seed=seed)
    return collect([tmp_path])


def figure(found, **where):
    drawn = against_nfe(cells_of(found, EVALUATIONS, where), "w2")
    drawn.canvas.draw()
    return drawn


def test_an_adaptive_solver_is_a_marker_beside_the_budgets(found):
    drawn = figure(found)
    assert [axis.get_title() for axis in drawn.axes] == ["euler", "heun2"]  # no panel of its own
    for axis in drawn.axes:
        assert axis.get_xlim()[1] < 3 * max(BUDGETS)
        labels = [text.get_text() for text in axis.get_xticklabels()]
        assert labels == [*map(str, BUDGETS), "dopri5\n(350)"]
        points = [c.lines[0].get_xydata() for c in axis.containers]
        assert sorted(len(p) for p in points) == [1, 1, 4, 4]
        assert all(p[0, 1] == pytest.approx(0.021) for p in points if len(p) == 1)


def test_the_same_where_solvers_are_the_curves(found):
    (axis,) = figure(found, **{"model.path": ["Linear"]}).axes
    names = axis.get_legend_handles_labels()[1]
    assert sorted(names) == ["dopri5", "euler", "heun2"]
    assert axis.get_xlim()[1] < 3 * max(BUDGETS)


def test_adaptive_solvers_alone_lie_at_what_they_took():
    records = [
        {"label": "dopri5", "method": "dopri5", "nfe": n, "metrics": {"w2": 1 / n}} for n in (20, 350)
    ]  # fmt: skip
    (axis,) = quality(records, ["w2"]).axes
    assert axis.containers[0].lines[0].get_xdata() == pytest.approx([20, 350])


def test_tick_labels_have_one_size(found):
    drawn = [figure(found), training(cells_of(found, FINAL, {}), ["train/loss"])]
    for axis in (axis for each in drawn for axis in each.axes):
        ticks = [*axis.xaxis.get_major_ticks(), *axis.yaxis.get_major_ticks()]
        ticks += [*axis.xaxis.get_minor_ticks(), *axis.yaxis.get_minor_ticks()]
        assert {tick.label1.get_size() for tick in ticks} == {8.0}


def test_a_solver_looks_the_same_whatever_stands_beside_it():
    first = dict(zip(["euler", "rk4", "heun2"], looks(["euler", "rk4", "heun2"]), strict=True))
    other = dict(zip(["heun2", "dopri5", "rk4"], looks(["heun2", "dopri5", "rk4"]), strict=True))
    assert first["heun2"] == other["heun2"]
    assert first["rk4"] == other["rk4"]
    assert looks(["rk4, w = 2"]) == [first["rk4"]]


def test_no_two_curves_look_alike():
    names = [
        "Linear(sigma_min=0.0)",
        "Linear(sigma_min=0.1)",
        "Trigonometric",
        "lr = 0.1",
        "lr = 1",
    ]
    for some in (names, [f"lr = {k}" for k in range(25)], list(FIXED)[:18]):
        found = [tuple(look.values()) for look in looks(some)]
        assert len(set(found)) == len(some)


def test_every_solver_and_path_has_a_look_of_its_own():
    from fmlightning.flow.paths import schedules
    from fmlightning.flow.solvers import ode, sde

    solvers = {*ode.FIXED, *ode.ADAPTIVE, *sde.METHODS}
    ours = [c for c in AffinePath.__subclasses__() if c.__module__ == schedules.__name__]
    paths = {cls.__name__ for cls in ours}
    assert solvers | paths - {"Curves"} <= set(FIXED)  # one's own curves have no name


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("frechet_digits@350", "Frechet distance (digits classifier),\n350 samples"),
        ("fid@50000", "FID, 50000 samples"),
        ("sfid@10", "sFID, 10 samples"),
        ("eval/w2", "Wasserstein-2 distance, during training"),
        ("val/loss", "Validation loss"),
        ("mine@3", "mine@3"),
    ],
)
def test_metrics_in_words(metric, words):
    assert in_words(metric) == words
