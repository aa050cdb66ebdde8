"""The gallery: every picture is drawn, films have their frames, and what is drawn as zero is zero."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "seed_gallery"))

import gallery
from pictures import comparison, continuity, couplings, flow_map, ode_sde, paths
from pictures.scene import DATA, EXTENT, F64, Detail, lattice

from fmlightning.flow.keys import Key

TINY = Detail(side=12, particles=60, frames=3, num_steps=12, dpi=20)
FILES = {
    "paths": {"paths.png": 1, "velocities.png": 1},
    "density": {"density.png": 1, "density.gif": TINY.frames},
    "flow_map": {"flow_map.png": 1, "flow_map.gif": TINY.frames},
    "comparison": {"comparison.png": 1},
    "continuity": {"continuity.png": 1},
    "ode_sde": {"ode_sde.png": 1},
    "couplings": {"couplings.png": 1},
}


def frames(file):
    """How many there are, each of them read."""
    with Image.open(file) as image:
        for k in range(image.n_frames):
            image.seek(k)
            image.load()
        return image.n_frames


@pytest.mark.slow
@pytest.mark.parametrize("name", gallery.PICTURES)
def test_every_picture_is_an_image_with_its_frames(name, tmp_path):
    files = list(gallery.make([name], tmp_path, TINY))
    assert {file.name: frames(file) for file in files} == FILES[name]


def test_the_folder_holds_every_picture_and_no_heavy_one():
    folder = Path(gallery.__file__).parent
    sizes = [(folder / file).stat().st_size for files in FILES.values() for file in files]
    assert max(sizes) < 600e3
    assert sum(sizes) < 3e6


def relative_residual(field):
    x = lattice(40)
    scale = continuity.terms(continuity.exact, x)[0].abs().max()
    return float(continuity.residual(field, x).abs().max() / scale)


def test_residuals_drawn_as_zero_are_zero_and_the_wrong_one_is_not():
    zero, turned, wrong = (relative_residual(field) for field in continuity.FIELDS.values())
    assert max(zero, turned) < 1e-6  # far above rounding, far below what a colour can show
    assert wrong > 0.1


def test_the_change_of_density_is_that_of_finite_differences():
    """The residual would vanish too if both of its terms did."""
    x, h, path = lattice(20), 1e-5, continuity.PATH
    low, high = (
        path.log_prob(x, torch.tensor(continuity.TIME + s * h, dtype=F64)).exp() for s in (-1, 1)
    )
    d_t = continuity.terms(continuity.exact, x)[0]
    torch.testing.assert_close(d_t, (high - low) / (2 * h), atol=1e-8, rtol=0)  # h^2 and 1e-16 / h


def test_the_colour_of_the_deformed_grid_is_the_density():
    """Mass over area, against the closed form, in cells that the flow has stretched little."""
    t = 0.5
    grid, _ = flow_map.carried(TINY, [0.0, t, 1.0])
    corners = flow_map.corners(grid[1])
    density = flow_map.mass() / flow_map.area(corners)
    exact = flow_map.PATH.marginal(t).log_prob(corners.mean(2).flatten(0, 1)).exp()
    # a cell of side 0.1 is not a point: second order in its side
    torch.testing.assert_close(density.flatten(), exact, atol=3e-3, rtol=0)


@pytest.mark.parametrize("t", paths.VELOCITY_TIMES)
def test_the_fan_of_conditional_velocities_averages_to_the_marginal_one(t):
    x, time, n = torch.tensor([[0.3, -0.8]], dtype=F64), torch.tensor(t, dtype=F64), 20_000
    u = (paths.possible_data(paths.MARGINAL, x, t, n) - x) / (1 - t)
    error = u.std(0) / n**0.5
    assert bool(((u.mean(0) - paths.MARGINAL.velocity(x, time)[0]).abs() < 4 * error).all())


def test_the_data_lie_in_the_picture():
    for law in (DATA, comparison.BOARD):
        x = law.sample((2000, 2), Key(3).generator(), F64)
        assert (x.abs() < EXTENT).all(1).double().mean() > 0.99


def test_paths_to_one_point_are_straight_on_the_ot_path_only():
    x0 = paths.noise(20)
    times = torch.linspace(0, 1, 65, dtype=F64)

    def detour(path):
        curve = path.path
        x1 = paths.ONE.expand_as(x0)
        return comparison.detour(torch.stack([curve.sample(x0, x1, t).xt for t in times]))

    straight, bent = map(detour, comparison.PATHS.values())
    assert straight == pytest.approx(1, abs=1e-12)
    assert bent > 1.05


def test_ode_and_sde_reach_one_law_by_different_ways():
    detail = Detail(particles=200, num_steps=50)
    x, y = ode_sde.solutions(detail)
    assert torch.equal(x[0], y[0])
    # 1.95 / sqrt(n) is passed by chance once in a thousand
    assert max(ode_sde.gap(x[-1]), ode_sde.gap(y[-1])) < 1.95 / x.shape[1] ** 0.5
    assert float((x[-1] - y[-1]).abs().mean()) > 0.1


def test_coupled_batches_use_every_point_once():
    x0 = paths.noise(48)
    x1 = DATA.sample((48, 2), Key(4).generator(), F64)
    for size in (16, 48):
        i, j = couplings.paired(couplings.MinibatchOT(), x0, x1, size)
        assert torch.equal(i.sort().values, torch.arange(48))
        assert torch.equal(j, torch.arange(48))
        assert torch.equal(i // size, j // size)
