"""The file of a sweep: its cells are the product of its axes, and what is wrong with it is one line."""

import pytest
import yaml

from fmlightning.studies.sweep.cells import cells, evaluate_arguments, fit_arguments
from fmlightning.studies.sweep.file import read_sweep

BASE = {"name": "tiny", "configs": ["base.yaml"]}


@pytest.fixture
def sweep(tmp_path):
    """A sweep of a file with these keys beside the base."""
    (tmp_path / "base.yaml").write_text("trainer: {max_steps: 2}\n")

    def write(**keys):
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(BASE | keys))
        return read_sweep(path)

    return write


def test_cells_are_the_product_less_the_exclusions_one_seed_after_the_other(sweep):
    found = sweep(
        axes={"a.x": [1, 2, 3], "method": {"m": {"b": 1}, "n": {"b": 2, "c": 3}}},
        seeds=[5, 7],
        exclude=[{"a.x": [2, 3], "method": "n"}, {"a.x": 1, "seed": 7}],
    )
    every = [(x, m, s) for s in (5, 7) for x in (1, 2, 3) for m in ("m", "n")]
    kept = [(x, m, s) for x, m, s in every if not (x > 1 and m == "n") and not (x == 1 and s == 7)]
    assert [(c.axes["a.x"], c.axes["method"], c.seed) for c in cells(found)] == kept
    assert cells(found)[1].options == {"a.x": 1, "b": 2, "c": 3}
    assert cells(found)[1].label == "a.x=1, method=n, seed=5"


def test_a_label_that_is_a_number_is_excluded_by_the_number(sweep):
    axes = {"size": {500: {"a": 1}, 1000: {"a": 2}}, "b": [0.1, 0.2]}
    found = sweep(axes=axes, exclude=[{"size": 500, "b": 0.1}, {"size": "1000", "b": "0.2"}])
    kept = {(c.axes["size"], c.axes["b"]) for c in cells(found)}
    assert kept == {("500", 0.2), ("1000", 0.1)}


def test_a_class_stands_before_its_arguments_on_the_command_line(sweep):
    """Which a change of the class would drop."""
    found = sweep(
        set={"model.network.width": 8, "trainer.precision": None},
        axes={"model.network": ["TimeMLP"], "data.flip": [True], "model.betas": [[0.9, 0.95]]},
    )
    (cell,) = cells(found)
    words = fit_arguments(found, cell.options)
    assert words[:3] == ["--config", str(found.path.parent / "base.yaml"), "--experiment=tiny"]
    assert words.index("--model.network=TimeMLP") < words.index("--model.network.width=8")
    assert {"--data.flip=true", "--model.betas=[0.9, 0.95]", "--trainer.precision=null"} < set(
        words
    )


def test_evaluate_is_asked_in_its_own_words(sweep):
    found = sweep(evaluate={"solvers": ["euler", "rk4"], "nfe": [4, 8], "tolerances": ["1e-5"], "ema": [True, False],
                            "grids": ["UniformGrid", {"class_path": "EDMGrid"}], "batch_size": 7})  # fmt: skip
    assert evaluate_arguments(found) == [
        "--batch_size=7", "--ema=true,false", '--grids=["UniformGrid", {"class_path": "EDMGrid"}]', "--nfe=4,8",
        "--solvers=euler,rk4", "--tolerances=1e-05",
    ]  # fmt: skip


def test_a_class_with_arguments_is_called_by_both(sweep):
    given = {"class_path": "fmlightning.flow.paths.affine.Bridge", "init_args": {"sigma": 0.5}}
    (cell,) = cells(sweep(axes={"model.path": [given]}))
    assert cell.axes == {"model.path": "Bridge(sigma=0.5)"}
    assert cell.options == {"model.path": given}


BAD = {
    "unknown key": ({"axis": {"a": [1]}}, "axis: unknown key; did you mean axes?"),
    "no name": ({"name": None}, "name: None must be letters"),
    "name leads out": ({"name": "../x"}, "name: ../x must be letters"),
    "no config": ({"configs": []}, "configs: [] must be a list of files"),
    "missing config": ({"configs": ["no.yaml"]}, "configs: no.yaml: no such file"),
    "empty axis": ({"axes": {"a.b": []}}, "axes.a.b: is empty"),
    "one value": ({"axes": {"a.b": 3}}, "axes.a.b: 3 is one value"),
    "value twice": ({"axes": {"a.b": [1, 2, 1]}}, "axes.a.b: 1 stands twice"),
    "label sets nothing": ({"axes": {"a": {"x": 3}}}, "axes.a.x: 3 must be a mapping of options"),
    "label with a comma": ({"axes": {"a": {"x, y": {"b": 1}}}}, "axes.a: 'x, y' has a comma"),
    "axis of seeds": ({"axes": {"seed": {"x": {"b": 1}}}}, "axes.seed: is the name of the seeds"),
    "label is yes": ({"axes": {"a": {True: {"b": 1}}}}, "axes.a: YAML reads a label as true"),
    "axes is a list": ({"axes": ["a.b"]}, "axes: ['a.b'] must be a mapping"),
    "empty seeds": ({"seeds": []}, "seeds: the list is empty"),
    "seed twice": ({"seeds": [1, 1]}, "seeds: 1 stands twice"),
    "seed no number": ({"seeds": ["a"]}, "seeds: a must be a whole number"),
    "seed is true": ({"seeds": [True]}, "seeds: True must be a whole number"),
    "set twice": ({"set": {"a": 1}, "axes": {"a": [1]}}, "a is set by set and by axes.a"),
    "axes overlap": ({"axes": {"a": [1], "m": {"x": {"a": 2}}}}, "a is set by axes.a and by axes.m"),
    "seed as option": ({"set": {"seed_everything": 1}}, "seed_everything is set by the sweep; use seeds"),
    "own run_dir": ({"axes": {"run_dir": ["a"]}}, "run_dir is set by the sweep; use name"),
    "resume": ({"set": {"ckpt_path": "auto"}}, "a sweep resumes by itself"),
    "exclude what": ({"exclude": [{"b": 1}]}, "exclude.b: unknown key"),
    "exclude nothing": ({"axes": {"a": [1]}, "exclude": [{"a": 2}]}, "exclude.a: 2 is not one of its values"),
    "exclude all": ({"axes": {"a": [1]}, "exclude": [{"a": 1}]}, "no cell is left of 1"),
    "exclude text": ({"exclude": ["a"]}, "exclude: a must be a mapping"),
    "evaluate unknown": ({"evaluate": {"solver": ["euler"]}}, "evaluate.solver: unknown key; did you mean solvers?"),
    "evaluate guide model": ({"evaluate": {"guidance.guide_model": "runs/a"}}, "guide_model: a sweep does not know"),
    "evaluate empty": ({"evaluate": {"nfe": []}}, "evaluate.nfe: [] must be a list with at least one value"),
    "evaluate scalar": ({"evaluate": {"nfe": 4}}, "evaluate.nfe: 4 must be a list"),
    "samples n": ({"samples": {"n": 0, "a": {"uniform": [0, 1]}}}, "samples.n: 0 must be a whole number above 0"),
    "samples method": ({"samples": {"n": 1, "method": "grid", "a": {"uniform": [0, 1]}}}, "samples.method: grid"),
    "samples of nothing": ({"samples": {"n": 1}}, "samples: names no option"),
    "samples distribution": ({"samples": {"n": 1, "a": {"normal": [0, 1]}}}, "samples.a: {'normal': [0, 1]} must be"),
    "samples ends": ({"samples": {"n": 1, "a": {"uniform": [1, 0]}}}, "the lower end first"),
    "samples log": ({"samples": {"n": 1, "a": {"log_uniform": [0, 1]}}}, "must be above 0"),
    "samples integers": ({"samples": {"n": 1, "a": {"integers": [0.5, 1]}}}, "must be whole numbers"),
}  # fmt: skip


@pytest.mark.parametrize(("keys", "message"), BAD.values(), ids=BAD)
def test_what_is_wrong_with_a_file_is_one_line(sweep, keys, message):
    with pytest.raises(ValueError, match=r"sweep\.yaml: ") as caught:
        cells(sweep(**keys))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n", "name: [\n", "name: a\nname: b\n", "\x00"])
def test_what_is_no_file_of_a_sweep_is_one_line(tmp_path, text):
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"sweep\.yaml: ") as caught:
        read_sweep(tmp_path / "sweep.yaml")
    assert "\n" not in str(caught.value)
