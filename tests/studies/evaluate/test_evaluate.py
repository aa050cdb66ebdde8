"""`fmlightning evaluate`: cells that are scored once, on the same noise."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fmlightning.cli.build import instantiate_data
from fmlightning.cli.load import load_flow
from fmlightning.cli.sample import class_labels
from fmlightning.flow.guidance import Guidance
from fmlightning.flow.labels import reference_labels
from fmlightning.metrics.transport import wasserstein2
from fmlightning.runs.checkpoint import read_checkpoint
from fmlightning.runs.checksum import append_checksum
from fmlightning.runs.directory import Run
from fmlightning.studies.evaluate.scoring import instantiate_metrics, weights_identity
from fmlightning.studies.evaluate.table import headline, table
from fmlightning.studies.report.figures import quality

METRICS = '--metrics=[{"class_path": "Wasserstein", "init_args": {"subsets": 1, "size": 100}}]'
SMALL = (
    "--trainer.max_steps=20",
    "--data.test_size=100",
    "--data.val_size=64",
    "--evaluation.metrics=[]",
)


@pytest.fixture
def run(trained):
    return trained("toy/moons", *SMALL)


def evaluated(fmlightning, run, *options):
    status, shown = fmlightning("evaluate", run, METRICS, "--device=cpu", *options)
    assert status == 0, shown
    return json.loads((run / "evaluations" / "evaluations.json").read_text())


def test_every_cell_is_scored_once_and_kept(fmlightning, run):
    options = ("--solvers=euler,heun2,dopri5", "--nfe=4,9", "--tolerances=1e-3")
    records = evaluated(fmlightning, run, *options)
    assert [(r["method"], r["budget"]) for r in records] == [
        ("euler", "4 steps"), ("euler", "9 steps"), ("heun2", "2 steps"), ("heun2", "4 steps"), ("dopri5", "tol 0.001"),
    ]  # fmt: skip
    assert [r["nfe"] for r in records[:4]] == [4, 9, 4, 8]
    assert all(r["metrics"]["straightness"] >= 1 for r in records)
    folder = run / "evaluations"
    lines = (folder / "table.md").read_text().splitlines()
    assert len(lines) == 2 + 5
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert (folder / "nfe.png").stat().st_size > 10_000

    # again: nothing is computed; a torn cell and a new one are
    files = {p: p.stat().st_mtime_ns for p in folder.glob("*-*.json")}
    assert len(files) == 5
    assert evaluated(fmlightning, run, *options) == records
    assert {p: p.stat().st_mtime_ns for p in files} == files
    torn = next(p for p in files if p.name.startswith("euler-4"))
    torn.write_text("[]")
    again = evaluated(fmlightning, run, *options)
    assert [r["metrics"] for r in again] == [r["metrics"] for r in records]
    assert [p for p in files if p.stat().st_mtime_ns != files[p]] == [torn]


def test_weights_have_the_same_identity_in_another_file(run, tmp_path):
    copy = tmp_path / "copy" / "checkpoints"
    copy.mkdir(parents=True)
    (copy.parent / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    content = read_checkpoint(run / "checkpoints" / "last.ckpt") | {"written": "later"}
    with (copy / "last.ckpt").open("w+b") as file:
        torch.save(content, file)
        append_checksum(file, content["global_step"])
    identity = weights_identity(str(run))
    assert weights_identity(str(copy.parent)) == identity
    next(iter(content["state_dict"].values())).add_(1)
    with (copy / "last.ckpt").open("w+b") as file:
        torch.save(content, file)
        append_checksum(file, content["global_step"])
    assert weights_identity(str(copy.parent))["checkpoint"] != identity["checkpoint"]


def test_it_scores_what_sample_makes(fmlightning, run, tmp_path):
    (record,) = evaluated(fmlightning, run, "--solvers=midpoint", "--nfe=6")
    out = tmp_path / "samples"
    status, shown = fmlightning(
        "sample", run, "--n=100", f"--out={out}", "--solver.method=midpoint", "--solver.num_steps=3"
    )
    assert status == 0, shown
    held_out = instantiate_data(Run.open(run).config).eval_samples("test")["x1"]
    x = torch.from_numpy(np.load(out / "samples.npz")["x"])
    assert record["metrics"]["w2"] == pytest.approx(wasserstein2(x, held_out), rel=1e-6)


def test_methods_of_odes_and_sdes_and_classes_share_budgets_and_noise(fmlightning, fit, tmp_path):
    run = fit("toy/moons", *SMALL, "--model.source=Gaussian")
    spec = '{"class_path": "SDESolver", "init_args": {"num_steps": 5, "method": "euler_maruyama"}}'
    options = (f"--solvers=[heun2, euler_maruyama, stochastic_heun, {spec}]", "--nfe=8")
    records = evaluated(fmlightning, run, *options, "--reference=1e-4")
    assert [(r["method"], r["budget"], r["nfe"]) for r in records] == [
        ("heun2", "4 steps", 8), ("euler_maruyama", "8 steps", 8), ("stochastic_heun", "4 steps", 8),
        ("euler_maruyama", "5 steps", 5),
    ]  # fmt: skip
    assert ["solver_error" in r["metrics"] for r in records] == [True, False, False, False]
    directions = records[0]["higher_is_better"]
    assert directions["w2"] is directions["solver_error"] is False
    assert directions["straightness"] is None
    out = tmp_path / "samples"
    status, shown = fmlightning(
        "sample", run, "--n=100", f"--out={out}", "--solver=SDESolver", "--solver.num_steps=4", "--batch_size=30"
    )  # fmt: skip
    assert status == 0, shown
    held_out = instantiate_data(Run.open(run).config).eval_samples("test")["x1"]
    x = torch.from_numpy(np.load(out / "samples.npz")["x"])
    assert records[2]["metrics"]["w2"] == pytest.approx(wasserstein2(x, held_out), rel=1e-5)


def test_another_path_leads_to_the_same_samples_and_is_a_cell_of_its_own(
    fmlightning, run, tmp_path
):
    """Along any path the flow has one end for each start: only the solver's error differs."""
    tight = ("--solver.method=dopri5", "--solver.rtol=1e-6", "--solver.atol=1e-6")
    ends = []
    for number, path in enumerate(((), ("--path=Trigonometric",))):
        out = tmp_path / str(number)
        status, shown = fmlightning("sample", run, "--n=50", f"--out={out}", *tight, *path)
        assert status == 0, shown
        assert ("floor, the ratio of data to noise" in shown) == bool(path)
        ends.append(np.load(out / "samples.npz")["x"])
    assert abs(ends[0] - ends[1]).max() < 1e-3
    options = ("--solvers=euler", "--nfe=4")
    (own,) = evaluated(fmlightning, run, *options)
    (other,) = evaluated(fmlightning, run, *options, "--path=Trigonometric")
    assert own["metrics"]["w2"] != other["metrics"]["w2"]
    assert other["path"] == "Trigonometric()"


def test_guidance_is_an_axis(fmlightning, fit):
    run = fit(
        "images/digits", "--trainer.max_steps=2", "--model.network.channels=8", "--model.network.head_channels=8",
        "--model.class_dropout_prob=0.1",
    )  # fmt: skip
    metrics = '--metrics=[{"class_path": "Frechet", "init_args": {"features": "digits", "num_samples": 100}}]'
    records = evaluated(
        fmlightning, run, metrics, "--solvers=euler", "--nfe=2", "--guidance.scale=1,3"
    )
    assert [r["guidance"]["scale"] for r in records] == [1, 3]
    assert [r["label"] for r in records] == ["euler", "euler, w = 3"]
    assert records[0]["metrics"] != records[1]["metrics"]
    assert {"frechet_digits@100", "accuracy@100"} <= set(records[0]["metrics"])


def test_labels_are_as_frequent_as_in_the_reference_or_balanced(fmlightning, fit, tmp_path, capsys):
    run = fit(
        "images/digits", "--trainer.max_steps=1", "--model.network.channels=8", "--model.network.head_channels=8",
        "--evaluation.metrics=[]",
    )  # fmt: skip
    flow, index = load_flow(run), torch.arange(20)
    assert sum(flow.class_counts) == 1297
    for order, expected in (
        ("reference", reference_labels(index, flow.class_counts)),
        ("balanced", index % 10),
    ):
        options = (
            "--n=20",
            f"--out={tmp_path / order}",
            "--solver.method=euler",
            f"--labels={order}",
        )
        status, shown = fmlightning("sample", run, *options)
        assert status == 0, shown
        assert np.load(tmp_path / order / "samples.npz")["y"].tolist() == expected.tolist()
    older = class_labels(replace(flow, class_counts=None), "reference")
    assert older(index).tolist() == (index % 10).tolist()
    assert "earlier version" in capsys.readouterr().out


def test_a_weaker_run_guides_as_in_sample_and_is_part_of_what_a_cell_is(
    fmlightning, fit, run, tmp_path
):
    weaker = fit("toy/moons", *SMALL, "--trainer.max_steps=3", name="weaker")
    options = ("--solvers=euler", "--nfe=4")
    by = (*options, f"--guidance.guide_model={weaker}", "--guidance.scale=1,2")
    (own,) = evaluated(fmlightning, run, *options)
    alone, guided = evaluated(fmlightning, run, *by)
    assert alone == own  # w = 1 is the run itself, and its cell is there already
    assert [r["label"] for r in (alone, guided)] == ["euler", "euler, w = 2 by a weaker run"]
    out = tmp_path / "samples"
    status, shown = fmlightning(
        "sample", run, "--n=100", f"--out={out}", "--solver.method=euler", "--solver.num_steps=4",
        f"--guidance.guide_model={weaker}", "--guidance.scale=2",
    )  # fmt: skip
    assert status == 0, shown
    held_out = instantiate_data(Run.open(run).config).eval_samples("test")["x1"]
    x = torch.from_numpy(np.load(out / "samples.npz")["x"])
    assert guided["metrics"]["w2"] == pytest.approx(wasserstein2(x, held_out), rel=1e-6)
    assert guided["metrics"]["w2"] != pytest.approx(own["metrics"]["w2"], rel=1e-3)

    times = {p: p.stat().st_mtime_ns for p in (run / "evaluations").glob("euler-*.json")}
    assert evaluated(fmlightning, run, *by) == [alone, guided]
    assert {p: p.stat().st_mtime_ns for p in times} == times
    fit(
        "toy/moons",
        *SMALL,
        "--trainer.max_steps=3",
        "--seed_everything=1",
        "--rerun",
        name="weaker",
    )
    again = evaluated(fmlightning, run, *by)  # other weights under the same name
    assert again[0] == alone
    assert again[1]["metrics"]["w2"] != guided["metrics"]["w2"]


def test_a_weaker_run_without_a_scale_or_of_other_samples_is_refused(fmlightning, fit, run):
    status, shown = fmlightning("evaluate", run, METRICS, f"--guidance.guide_model={run}")
    assert status == 2
    assert "does nothing at --guidance.scale 1: add --guidance.scale 1,2" in shown
    digits = fit(
        "images/digits", "--trainer.max_steps=1", "--model.network.channels=8", "--model.network.head_channels=8",
        name="digits",
    )  # fmt: skip
    for argv in (
        ("evaluate", run, METRICS, f"--guidance.guide_model={digits}", "--guidance.scale=2"),
        ("sample", run, f"--guidance.guide_model={digits}", "--guidance.scale=2"),
    ):
        status, shown = fmlightning(*argv)
        assert status == 2
        assert f"guide_model {digits} makes samples of shape (1, 8, 8), and this run (2,)" in shown


LIKELIHOOD = """--metrics=[{"class_path": "NegativeLogLikelihood", "init_args": {
    "size": 4, "batch_size": 4, "rtol": 1e-2, "atol": 1e-2, "within": 1e9, "divergence": "hutchinson"}}]"""


def test_likelihoods_are_those_of_the_guided_field(fmlightning, fit):
    """w = 1 is the model itself, whose likelihood the run's own metrics have; w = 3 follows another field."""
    run = fit(
        "images/digits", "--trainer.max_steps=30", "--model.network.channels=8", "--model.network.head_channels=8",
        "--model.class_dropout_prob=0.2", "--model.optimizer.lr=0.01",
    )  # fmt: skip
    records = evaluated(
        fmlightning, run, LIKELIHOOD, "--solvers=euler", "--nfe=1,2", "--guidance.scale=1,3"
    )
    found = {(r["nfe"], r["guidance"]["scale"]): r["metrics"]["nll"] for r in records}
    assert found[1, 1] == found[2, 1]  # whatever the solver of the samples
    assert found[1, 3] == found[2, 3]
    assert abs(found[1, 1] - found[1, 3]) > 1e-2
    metric = instantiate_metrics([json.loads(LIKELIHOOD.split("=", 1)[1])[0]])[0]
    flow, data = load_flow(run), instantiate_data(Run.open(run).config)
    data.setup("test")
    metric.fit_reference(data.pixel_data)
    for scale, field in ((1, flow.field), (3, flow.guided(Guidance(3.0)))):
        metric.evaluate_model(field, flow.source, None, 0, 1)
        assert metric.compute()["nll"] == pytest.approx(found[1, scale], rel=1e-9)
        metric.reset()


def test_a_score_that_a_cell_lacks_is_a_dash_and_the_tolerances_have_no_panel():
    metrics = ({"nll_difference": 1e-3, "nll": 2.0, "w2": 1.0}, {"nll_difference": 3.0, "w2": 2.0})
    records = [
        {"method": "euler", "label": "euler", "budget": f"{n} steps", "nfe": n, "grid": "", "ema": True,
         "guidance": {"scale": 1}, "seconds_per_sample": 1.0, "metrics": m}
        for n, m in enumerate(metrics, 1)
    ]  # fmt: skip
    for order in (records, records[::-1]):
        header, *rows = table(order)
        assert {row[header.index("nll")] for row in rows} == {"2", "-"}
        assert sorted(headline(order)) == ["nll", "w2"]
        assert len(quality(order, headline(order)).axes) == 2


def test_guidance_asks_for_a_model_that_was_trained_without_labels_too(fmlightning, fit, tmp_path):
    run = fit(
        "images/digits", "--trainer.max_steps=1", "--model.network.channels=8", "--model.network.head_channels=8",
    )  # fmt: skip
    status, shown = fmlightning(
        "sample", run, "--n=2", f"--out={tmp_path / 'o'}", "--guidance.scale=2"
    )
    assert status == 2
    assert "class_dropout_prob > 0" in shown


@pytest.mark.parametrize(
    "option",
    ["--guidance.guide_model=RUN", "--guidance.rescale=true", "--guidance.t_range=[0.2,0.8]"],
)
def test_guidance_without_a_scale_is_refused(fmlightning, run, tmp_path, option):
    out = tmp_path / "out"
    option = option.replace("RUN", str(run))
    sample = ("sample", run, "--n=4", f"--out={out}", "--device=cpu", option)
    status, shown = fmlightning(*sample)
    assert status == 2
    assert "does nothing at guidance.scale=1: add --guidance.scale 2" in shown
    assert option.split("=")[0].removeprefix("--") in shown
    assert not out.exists()
    assert fmlightning(*sample, "--guidance.scale=1")[0] == 0  # said, and so meant


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--solvers=heun",), "--solvers heun: choose from euler"),
        (("--solvers=rk4", "--nfe=3"), "pays for no step of rk4"),
        (("--guidance.scale=2",), "needs a model with labels"),
        (("--guidance=1,2",), "scales are --guidance.scale 1,2"),
        (
            ("--guidance.guide_model=nowhere", "--guidance.scale=2"),
            "nowhere is not a run directory",
        ),
        (("--nfe=5,,6",), "--nfe"),
        (("--tolerances=-1", "--solvers=dopri5"), "rtol=-1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(fmlightning, run, options, message):
    status, shown = fmlightning("evaluate", run, METRICS, *options)
    assert status == 2
    assert message in shown
    assert "Traceback" not in shown
    assert not (run / "evaluations").exists()


def test_budgets_are_looked_at_before_metrics(fmlightning, run):
    status, shown = fmlightning("evaluate", run, "--nfe=0")
    assert status == 2
    assert "--nfe [0]" in shown


def test_grids_and_weights_are_axes(fmlightning, run):
    grids = (
        '--grids=[UniformGrid, {"class_path": "ShiftedGrid", "init_args": {"shift": 1.0}}, EDMGrid]'
    )
    options = ("--solvers=euler,dopri5", "--nfe=4", "--tolerances=1e-3")
    records = evaluated(fmlightning, run, *options, grids, "--ema=true,false")
    fixed = [(r["grid"], r["ema"]) for r in records if r["method"] == "euler"]
    names = ["UniformGrid()", "ShiftedGrid(shift=1.0)", "EDMGrid()"]
    assert fixed == [(grid, ema) for ema in (True, False) for grid in names]
    assert [r["ema"] for r in records if r["method"] == "dopri5"] == [
        True,
        False,
    ]  # no grid of its own
    scores = {(r["method"], r["grid"], r["ema"]): r["metrics"]["w2"] for r in records}
    for ema in (True, False):  # a shift of 1 is none
        assert scores["euler", names[1], ema] == pytest.approx(
            scores["euler", names[0], ema], rel=1e-5
        )
        assert scores["euler", names[2], ema] != scores["euler", names[0], ema]
    assert scores["euler", names[0], True] != scores["euler", names[0], False]
    assert [r["label"] for r in records[:3]] == [
        "euler", "euler on ShiftedGrid(shift=1.0)", "euler on EDMGrid",
    ]  # fmt: skip
    raw = [r for r in records if not r["ema"]][:1]
    assert evaluated(fmlightning, run, "--solvers=euler", "--nfe=4", "--ema=false") == raw
