"""Names of earlier versions: read in what was saved, refused in what one writes, and each known to lead somewhere."""

import copy
import subprocess
import sys
from importlib import import_module

import pytest

from fmlightning.runs import legacy

OLD = {
    "model": {
        "network": {"class_path": "fmlightning.nets.mlp.TimeMLP", "init_args": {"width": 64}},
        "path": {"class_path": "fmlightning.flow.schedules.SchrodingerBridge", "init_args": {"s": 0.5, "margin": 1e-3}},
        "source": {"class_path": "fmlightning.flow.sources.Given", "init_args": {}},
        "coupling": {
            "class_path": "fmlightning.flow.couplings.ClasswiseOT",
            "init_args": {"within": {"class_path": "fmlightning.flow.couplings.MinibatchOT", "init_args": {}}},
        },
        "predicts": "data",
        "times": {"class_path": "fmlightning.flow.times.LogitNormal", "init_args": {"mean": 0.0}},
        "weight": {"class_path": "fmlightning.flow.weightings.AsVelocity", "init_args": {}},
        "objective": None,
        "scheduler": {"class_path": "fmlightning.training.decay.Constant", "init_args": {}},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}},
        "label_drop": 0.2,
        "solver": {"method": "heun2", "grid": {"class_path": "fmlightning.flow.times.ListedGrid", "init_args": {}}},
        "guidance": {"scale": 1.5, "interval": [0.0, 1.0]},
        "ahead": 2,
    },
    "data": {"class_path": "mine.Data", "init_args": {"s": 1, "margin": 2}},
    "evaluation": {"judges": [{"class_path": "fmlightning.metrics.neighbours.Neighbours", "init_args": {}}],
                   "at_end": True},
}  # fmt: skip

NEW = {
    "model": {
        "network": {"class_path": "fmlightning.nets.TimeMLP", "init_args": {"width": 64}},
        "path": {"class_path": "fmlightning.flow.SchrodingerBridge", "init_args": {"noise_std": 0.5, "t_eps": 1e-3}},
        "source": {"class_path": "fmlightning.flow.PairedSource", "init_args": {}},
        "coupling": {
            "class_path": "fmlightning.flow.ClasswiseOT",
            "init_args": {"within": {"class_path": "fmlightning.flow.MinibatchOT", "init_args": {}}},
        },
        "times": {"class_path": "fmlightning.flow.LogitNormal", "init_args": {"mean": 0.0}},
        "objective": {
            "class_path": "fmlightning.flow.CFM",
            "init_args": {"prediction": "data",
                          "weighting": {"class_path": "fmlightning.flow.AsVelocity", "init_args": {}}},
        },
        "scheduler": {"class_path": "fmlightning.training.Constant", "init_args": {}},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}},
        "class_dropout_prob": 0.2,
        "solver": {
            "class_path": "fmlightning.flow.ODESolver",
            "init_args": {"method": "heun2", "grid": {"class_path": "fmlightning.flow.CustomGrid", "init_args": {}}},
        },
        "guidance": {"scale": 1.5, "t_range": [0.0, 1.0]},
        "prefetch": 2,
    },
    "data": {"class_path": "mine.Data", "init_args": {"s": 1, "margin": 2}},
    "evaluation": {"metrics": [{"class_path": "fmlightning.metrics.KNNAccuracy", "init_args": {}}],
                   "at_end": True},
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_noted(monkeypatch):
    monkeypatch.setattr(legacy, "noted", [])


def test_a_saved_config_is_read_under_the_names_of_today():
    before = copy.deepcopy(OLD)
    found = legacy.translate(OLD, "runs/x/config.yaml")
    assert found == NEW
    assert before == OLD, "the one that was read has changed"
    assert list(found["model"]["guidance"]) == ["scale", "t_range"], "in its place"


def test_a_config_of_today_stays_as_it_is(capsys):
    assert legacy.translate(NEW, "x") == NEW
    assert capsys.readouterr().err == ""


def test_maximum_likelihood_was_the_one_objective():
    old = {
        "model": {
            "predicts": "velocity",
            "weight": {},
            "objective": {"method": "dopri5", "rtol": 1e-3},
        }
    }
    arguments = {"method": "dopri5", "rtol": 1e-3}
    expected = {"class_path": "fmlightning.flow.MaximumLikelihood", "init_args": arguments}
    assert legacy.translate(old, "x") == {"model": {"objective": expected}}


def test_one_note_is_printed(capsys, monkeypatch):
    legacy.translate(OLD, "runs/x/config.yaml")
    legacy.translate(OLD, "runs/y/config.yaml")
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "runs/x/config.yaml" in shown
    monkeypatch.setattr(legacy, "noted", [])
    monkeypatch.setenv("LOCAL_RANK", "1")
    legacy.translate(OLD, "runs/x/config.yaml")
    assert capsys.readouterr().err == ""


def test_a_class_is_looked_for_first_in_the_room_it_was_in(monkeypatch):
    """Two rooms may each have a class of a name: a constant rate, a constant diffusion."""
    monkeypatch.setattr(import_module("fmlightning.flow"), "__all__", ["Constant"])
    assert (
        legacy.class_path("fmlightning.training.decay.Constant") == "fmlightning.training.Constant"
    )
    assert legacy.class_path("fmlightning.flow.sde.Constant") == "fmlightning.flow.Constant"


OTHERS = ("mine.Linear", "torch.nn.Linear", "fmlightning.flow.x.Nowhere", "Linear", "fmlightning.x")


@pytest.mark.parametrize("path", OTHERS)
def test_other_paths_are_left_alone(path):
    assert legacy.class_path(path) == path


@pytest.mark.parametrize("old", legacy.CLASSES)
def test_a_new_class_is_there(old):
    known = {
        name for room in legacy.FACADES for name in import_module(f"fmlightning.{room}").__all__
    }
    assert legacy.CLASSES[old] in known
    assert old not in known


MARKS = [("manifest.json", True), ("model.safetensors", True), ("sweep.yaml", False)]


@pytest.mark.parametrize(("beside", "saved"), MARKS)
def test_a_config_is_a_saved_one_by_what_lies_beside_it(tmp_path, beside, saved):
    (tmp_path / beside).touch()
    assert legacy.is_saved(tmp_path / "config.yaml") is saved


def test_it_is_read_without_torch():
    code = (
        "import sys; from fmlightning.runs.legacy import class_path\n"
        "assert class_path('fmlightning.flow.schedules.Linear') == 'fmlightning.flow.Linear'\n"
        "assert not {'torch', 'lightning', 'jsonargparse'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
