"""Configs as options, and what differs between them."""

import pytest
from paper_runs import config

from fmlightning.runs.config_hash import config_hash, result_parts
from fmlightning.studies.report.axes import Labels, called, differing, flat, same, split
from fmlightning.studies.report.records import ADAPTIVE, written


def options(**changes):
    return dict(flat(result_parts(config(0, **changes))))


def test_a_class_is_the_value_of_its_option():
    found = options()
    assert found["model.path"] == "Linear"
    assert found["model.path.sigma_min"] == 0.0
    assert found["data.batch_size"] == 256
    assert found["trainer.max_steps"] == 100


def test_another_class_is_one_difference_and_not_one_for_each_argument():
    other = options(path="Trigonometric")
    del other["model.path.sigma_min"]
    assert differing([options(), other]) == ["model.path"]


def test_an_argument_of_one_class_is_a_difference_by_itself():
    other = options(model__path={"class_path": "x.Linear", "init_args": {"sigma_min": 0.1}})
    assert differing([options(), other]) == ["model.path.sigma_min"]


def test_classes_are_told_apart_by_arguments_only_where_they_must():
    configs = [
        options(),
        options(model__path={"class_path": "x.Linear", "init_args": {"sigma_min": 0.1}}),
        options(model__path={"class_path": "x.Trigonometric"}),
    ]
    named = Labels.of("model.path", configs)
    assert [named(c) for c in configs] == [
        "Linear(sigma_min=0.0)",
        "Linear(sigma_min=0.1)",
        "Trigonometric",
    ]


@pytest.mark.parametrize(
    ("change", "changes"),
    [
        ({"model__optimizer": {"lr": 0.1}}, True),
        ({"model__solver": {"method": "rk4"}}, False),
        ({"experiment": "other"}, False),
        ({"data__init_args": {"batch_size": 256, "num_workers": 4}}, False),
    ],
)
def test_what_differs_is_what_the_hash_covers(change, changes):
    a, b = config(0), config(0, **change)
    assert (config_hash(a) != config_hash(b)) is changes
    assert bool(differing([dict(flat(result_parts(c))) for c in (a, b)])) is changes


def test_commas_inside_brackets_stay():
    assert list(split("a, B(c=1, d=[2, 3]), e")) == ["a", "B(c=1, d=[2, 3])", "e"]


def test_the_settings_of_a_solver_are_read_back():
    text = "ODESolver(method='heun2', num_steps=5, grid=SNRGrid(rho=7, ends=(0, 1)))"
    assert dict(written(text)) == {
        "method": "'heun2'",
        "num_steps": "5",
        "grid": "SNRGrid(rho=7, ends=(0, 1))",
    }


@pytest.mark.parametrize(
    ("text", "value", "equal"),
    [("10", 10, True), ("1e-3", 0.001, True), ("linear", "Linear", True), ("none", None, True), ("null", None, True),
     ("10", "10 steps", False), ("Lin", "Linear", False)],
)  # fmt: skip
def test_what_is_typed_means_a_value(text, value, equal):
    assert same(text, value) is equal


def test_numbers_are_written_shortly():
    assert [called(v) for v in (0.1 + 0.2, 1e-5, 3, "x", None)] == ["0.3", "1e-05", "3", "x", "None"]  # fmt: skip


def test_adaptive_methods_are_those_of_the_solver():
    from fmlightning.flow.solvers import ode

    assert set(ADAPTIVE) == set(ode.ADAPTIVE)
