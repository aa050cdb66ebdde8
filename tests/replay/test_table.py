"""What the library computes is what it has computed before: `table.py` says what, and how it is written down."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cases
import pytest
import table

HELD = {name: case for name, case in table.CASES.items() if not case.free}
TRAINED = {name: case.training for name, case in HELD.items() if case.training is not None}


def each(names: Iterable[str]) -> list[Any]:
    """Parameters of which the cheap ones alone are in the fast tests."""
    return [pytest.param(n, marks=() if n in cases.CHEAP else pytest.mark.slow) for n in names]


def written(file: Path) -> dict[str, Any]:
    """What a file has of this machine."""
    if (found := table.read(file).get(table.machine())) is None:
        pytest.skip(f"{file.name} has nothing of {table.machine()}")
    return found


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> table.Workshop:
    return table.Workshop(tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def double_shop(tmp_path_factory: pytest.TempPathFactory) -> table.Workshop:
    return table.Workshop(tmp_path_factory.mktemp("double"), double=True)


def test_every_case_is_written_down() -> None:
    for found in table.read(table.DIGESTS).values():
        assert set(found) == set(table.CASES)
    for found in table.read(table.DEMO).values():
        assert set(found) == set(table.DEMOS)
    assert set(table.read(table.FLOAT64)) == set(TRAINED)
    assert set(cases.CHEAP) <= set(HELD)


@pytest.mark.parametrize("name", each(HELD))
def test_not_a_bit_has_changed(shop: table.Workshop, name: str) -> None:
    expected = written(table.DIGESTS)[name]
    assert HELD[name].compute(shop) == expected


@pytest.mark.parametrize("name", each(TRAINED))
def test_double_precision_is_the_same_on_every_machine(
    double_shop: table.Workshop, name: str
) -> None:
    numbers = table.summary(table.network(double_shop.fit(name, TRAINED[name])))
    assert table.distance(numbers, table.read(table.FLOAT64)[name]) <= table.RELATIVE


@pytest.mark.slow
@pytest.mark.parametrize("name", table.DEMOS)
def test_the_demo_has_every_digit_of_its_scores(tmp_path: Path, name: str) -> None:
    expected = written(table.DEMO)[name]
    assert table.DEMOS[name].compute(table.Workshop(tmp_path / "shop")) == expected
