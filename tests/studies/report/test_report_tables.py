"""From run directories to tables: what is averaged, what is refused, and what is bold."""

import csv
import io
import json
import os
import re
import zipfile
from hashlib import sha256

import pytest
from paper_runs import write_cell, write_plan, write_run
from scipy import stats

from fmlightning.runs.checksum import append_checksum
from fmlightning.studies.report.cells import cells_of
from fmlightning.studies.report.formats import (
    difference_grid,
    latex,
    markdown,
    score_csv,
    score_grid,
)
from fmlightning.studies.report.reading import collect
from fmlightning.studies.report.records import EVALUATIONS, FINAL
from fmlightning.studies.report.table import (
    confounded,
    differences,
    fewer,
    tabulate,
    unranked,
)

LINEAR = (0.20, 0.24, 0.31)
TRIGONOMETRIC = (0.30, 0.33, 0.42)


def write_two_paths(folder, scores=(LINEAR, TRIGONOMETRIC)):
    for path, values in zip(("Linear", "Trigonometric"), scores, strict=True):
        for seed, w2 in enumerate(values):
            write_run(folder / f"{path}-s{seed}", seed, {"w2": w2}, path=path)
    return folder


def cells(folder, kind=FINAL, **where):
    return cells_of(collect([folder]), kind, where)


def texts(grid):
    return [[piece.text for piece in row] for row in grid]


def test_the_option_that_differs_is_the_row(tmp_path):
    table = tabulate(cells(write_two_paths(tmp_path)))
    assert table.rows == ("model.path",)
    assert table.keys == [("Linear",), ("Trigonometric",)]
    estimate = table.estimate(("Linear",), table.heads[0])
    assert (estimate.mean, estimate.n) == (pytest.approx(0.25), 3)


def test_seeds_alone_are_one_row(tmp_path):
    write_two_paths(tmp_path)
    table = tabulate(cells(tmp_path, **{"model.path": ["Linear"]}))
    assert (table.rows, table.keys) == ((), [()])


def test_another_option_is_named_and_not_averaged(tmp_path):
    write_two_paths(tmp_path)
    write_run(tmp_path / "fast-s0", 0, {"w2": 0.9}, model__optimizer={"lr": 0.1})
    with pytest.raises(ValueError, match=r"differ in model\.optimizer\.lr \(0\.001, 0\.1\) too"):
        tabulate(cells(tmp_path), rows=["model.path"])
    table = tabulate(cells(tmp_path))  # and by default it is a row of its own
    assert table.rows == ("model.path", "model.optimizer.lr")
    assert len(table.keys) == 3


def test_options_that_change_together_are_named(tmp_path):
    write_run(tmp_path / "a", 0, {"w2": 0.2})
    write_run(tmp_path / "b", 0, {"w2": 0.3}, path="Trigonometric", model__optimizer={"lr": 0.1})
    found = cells(tmp_path)
    (note,) = confounded(found, found.axes)
    assert note.startswith("model.path, model.optimizer.lr change together")
    table = tabulate(found)
    _, alone = differences(table, {"model.path": "Linear"})
    assert alone == [
        "model.path=Trigonometric, model.optimizer.lr=0.1 has no baseline: there is no row model.path=Linear, "
        "model.optimizer.lr=0.1, so others differ in more"
    ]


def test_a_seed_twice_is_refused_with_both_places(tmp_path):
    write_two_paths(tmp_path)
    write_run(tmp_path / "again", 0, {"w2": 0.2})
    with pytest.raises(ValueError, match=r"seed 0 .*Linear-s0 and .*again"):
        tabulate(cells(tmp_path))


def test_rows_on_fewer_seeds_are_named(tmp_path):
    write_two_paths(tmp_path, (LINEAR, TRIGONOMETRIC[:2]))
    found = cells(tmp_path)
    assert fewer(tabulate(found), found.seeds) == [
        "model.path=Trigonometric: only 2 of 3 seeds, without 2"
    ]


def test_one_seed_says_so_in_every_format(tmp_path):
    write_run(tmp_path / "a", 0, {"w2": 0.25})
    table = tabulate(cells(tmp_path), metrics=["w2"])
    assert texts(score_grid(table)) == [["n", "w2 ↓", "95 %"], ["1", "0.25", "n = 1"]]
    assert "n = 1" in markdown(score_grid(table))
    assert "n = 1" in latex(score_grid(table), 0)
    row = next(csv.DictReader(io.StringIO(score_csv(table))))
    assert row == {"w2": "0.25", "w2 95 %": "n = 1", "w2 std": "", "w2 n": "1"}


def test_intervals_and_differences_are_those_of_scipy(tmp_path):
    table = tabulate(cells(write_two_paths(tmp_path)), metrics=["w2"])
    row = next(csv.DictReader(io.StringIO(score_csv(table))))
    assert float(row["w2 95 %"]) == pytest.approx(stats.sem(LINEAR) * stats.t.ppf(0.975, 2))
    (found,) = differences(table, {"model.path": "Linear"})[0].values()
    known = stats.ttest_rel(TRIGONOMETRIC, LINEAR)
    assert found.p == pytest.approx(known.pvalue)  # one comparison: no correction
    assert found.estimate.mean == pytest.approx(0.1)
    low, high = known.confidence_interval(0.95)
    assert 2 * found.estimate.half_width == pytest.approx(high - low)


def test_rows_that_lack_seeds_are_paired_by_those_they_share(tmp_path):
    for seed in (0, 1, 2):
        write_run(tmp_path / f"linear-s{seed}", seed, {"w2": LINEAR[seed]})
        write_run(tmp_path / f"other-s{seed + 1}", seed + 1, {"w2": TRIGONOMETRIC[seed]}, path="Other")  # fmt: skip
    table = tabulate(cells(tmp_path), metrics=["w2"])
    (found,) = differences(table, {"model.path": "Linear"})[0].values()
    known = stats.ttest_rel(TRIGONOMETRIC[:2], LINEAR[1:])
    assert (found.estimate.n, found.p) == (2, pytest.approx(known.pvalue))


def test_a_row_of_one_seed_takes_no_part_in_the_correction(tmp_path):
    write_two_paths(tmp_path)
    write_run(tmp_path / "lone-s0", 0, {"w2": 0.5}, path="Lone")
    table = tabulate(cells(tmp_path), metrics=["w2"])
    found = {key: d for (key, _), d in differences(table, {"model.path": "Linear"})[0].items()}
    assert found[("Trigonometric",)].p == pytest.approx(
        stats.ttest_rel(TRIGONOMETRIC, LINEAR).pvalue
    )
    assert found[("Lone",)].p == 1


def test_pairs_see_what_the_spread_over_seeds_hides(tmp_path):
    """Intervals overlap, yet each seed says the same: bold."""
    table = tabulate(cells(write_two_paths(tmp_path)), metrics=["w2"])
    assert stats.ttest_ind(LINEAR, TRIGONOMETRIC).pvalue > 0.05
    assert table.best == {(("Linear",), table.heads[0])}
    grid = difference_grid(table, differences(table, {"model.path": "Linear"})[0])
    assert [p.text for p in grid[1] if p.bold] == ["+0.100"]


@pytest.mark.parametrize(
    "other",
    [(0.15, 0.33, 0.42), (0.30, None, None), (0.21, 0.24, 0.30)],
    ids=["a seed says otherwise", "one seed in common", "hardly worse"],
)
def test_nothing_is_bold_where_the_pairs_do_not_say_so(tmp_path, other):
    write_two_paths(tmp_path, (LINEAR, [v for v in other if v is not None]))
    assert tabulate(cells(tmp_path), metrics=["w2"]).best == set()


def test_more_rows_need_more_evidence(tmp_path):
    """p just below 0.05 is enough against one other row, and not against two after Holm's correction."""
    one, two = (0.225, 0.30, 0.36), (0.226, 0.30, 0.361)
    for other in (one, two):
        assert 0.025 < stats.ttest_rel(LINEAR, other).pvalue < 0.05
    found = cells(write_two_paths(tmp_path / "two", (LINEAR, one)))
    assert tabulate(found, metrics=["w2"]).best
    write_two_paths(tmp_path / "three", (LINEAR, one))
    for seed, w2 in enumerate(two):
        write_run(tmp_path / "three" / f"vp-s{seed}", seed, {"w2": w2}, path="VariancePreserving")
    assert tabulate(cells(tmp_path / "three"), metrics=["w2"]).best == set()


def write_higher(folder, names, higher):
    """Trigonometric scores higher than Linear in all metrics and seeds."""
    for path, values in (("Linear", (0.90, 0.91, 0.92)), ("Trigonometric", (0.95, 0.96, 0.97))):
        for seed, v in enumerate(values):
            scores = dict.fromkeys(names, v)
            write_run(folder / f"{path}-s{seed}", seed, scores, path=path, higher=higher(seed))
    return tabulate(cells(folder), metrics=names)


def test_what_is_better_is_what_the_records_declare(tmp_path):
    declared = {"up": True, "down": False, "way": None, "accuracy": False}  # before the known names
    table = write_higher(tmp_path, ["up", "down", "way", "accuracy"], lambda seed: declared)
    assert texts(score_grid(table))[0][2::2] == ["up ↑", "down ↓", "way", "accuracy ↓"]
    assert {(head.metric, key) for key, head in table.best} == {
        ("up", ("Trigonometric",)),
        ("down", ("Linear",)),
        ("accuracy", ("Linear",)),
    }
    assert unranked(table) == []


def test_what_is_better_in_older_records_follows_from_known_names(tmp_path):
    names = ["accuracy_digits@350", "w2@50", "path_energy", "kl_se"]
    table = write_higher(tmp_path, names, lambda seed: None)
    assert [head.better for head in table.heads] == ["higher", "lower", "neither", "lower"]
    assert unranked(table) == []


@pytest.mark.parametrize("higher", [lambda seed: None, lambda seed: {"mine": seed > 0}])
def test_of_a_metric_that_nothing_is_known_of_nothing_is_bold(tmp_path, higher):
    table = write_higher(tmp_path, ["mine", "accuracy"], higher)
    found, _ = differences(table, {"model.path": "Linear"})
    grids = [score_grid(table), difference_grid(table, found)]
    assert grids[0][0][1 + 1].text == "mine"
    for grid in grids:
        bold = [[cell.text for cell in row if cell.bold] for row in zip(*grid, strict=True)]
        assert sum(map(len, bold)) == 1  # of accuracy
    (note,) = unranked(table)
    assert note.startswith("mine: nothing is bold")


def test_a_declaration_that_is_none_is_damage(tmp_path):
    write_run(tmp_path / "a", 0, {"w2": 0.2}, higher={"w2": "yes"})
    with pytest.raises(ValueError, match="higher_is_better"):
        collect([tmp_path])


def test_a_row_that_diverged_is_shown_and_nothing_is_bold_beside_it(tmp_path):
    table = tabulate(cells(write_two_paths(tmp_path, (LINEAR, (0.3, float("nan"), 0.4)))))
    assert texts(score_grid(table))[2][:4] == ["Trigonometric", "3", "nan", "± nan"]
    assert table.best == set()
    assert [d.p for d in differences(table, {"model.path": "Linear"})[0].values()] == [1.0]


def test_scores_on_other_data_are_not_better(tmp_path):
    for size, level in ((256, 0.2), (512, 0.6)):
        for seed in range(3):
            init = {"batch_size": size}
            write_run(tmp_path / f"{size}-s{seed}", seed, {"w2": level + seed / 100}, data__init_args=init)  # fmt: skip
    table = tabulate(cells(tmp_path))
    assert table.rows == ("data.batch_size",)
    assert table.best == set()


# -- evaluations ----------------------------------------------------------------------------------


def write_evaluations(folder):
    for path, level in (("Linear", 0.2), ("Trigonometric", 0.3)):
        for seed in (0, 1):
            run = write_run(folder / f"{path}-s{seed}", seed, {"w2": level}, path=path)
            for method in ("euler", "heun2"):
                for nfe in (4, 8):
                    w2 = level + 1 / nfe + seed / 100
                    write_cell(run, method, nfe, {"w2": w2}, seed=seed)
            write_cell(run, "dopri5", 60 + seed, {"w2": level}, seed=seed)
    return folder


def test_solver_and_nfe_are_axes(tmp_path):
    table = tabulate(cells(write_evaluations(tmp_path), EVALUATIONS), metrics=["w2", "nfe"])
    assert table.rows == ("model.path", "solver", "nfe")
    key = (
        "Linear",
        "dopri5",
        "tol 1e-05",
    )  # what it took differs by seed, and what it was given does not
    assert [table.estimate(key, head).mean for head in table.heads] == pytest.approx([0.2, 60.5])
    assert table.keys[:3] == [key, ("Linear", "euler", 4), ("Linear", "euler", 8)]


def test_an_axis_as_columns(tmp_path):
    found = cells(write_evaluations(tmp_path), EVALUATIONS, solver=["euler", "heun2"])
    table = tabulate(found, columns=["nfe"], metrics=["w2"])
    assert table.rows == ("model.path", "solver")
    assert texts(score_grid(table))[0] == [
        "model.path",
        "solver",
        "n",
        "nfe = 4",
        "95 %",
        "nfe = 8",
        "95 %",
    ]
    first = [table.estimate(("Linear", "euler"), head).mean for head in table.heads]
    assert first == pytest.approx([0.455, 0.33])


def test_every_row_has_the_baseline_that_is_like_it_in_all_else(tmp_path):
    table = tabulate(cells(write_evaluations(tmp_path), EVALUATIONS), metrics=["w2"])
    found, alone = differences(table, {"model.path": "Linear"})
    assert {key[0] for key, _ in found} == {"Trigonometric"}
    assert len(found) == 5
    assert alone == []
    assert all(d.estimate.mean == pytest.approx(0.1) for d in found.values())


def test_a_row_of_other_columns_than_its_baseline_is_told_which(tmp_path):
    for path, nfe in (("Linear", 4), ("Trigonometric", 6)):
        write_cell(write_run(tmp_path / path, 0, path=path), "euler", nfe, {"w2": 0.2})
    table = tabulate(cells(tmp_path, EVALUATIONS), columns=["nfe"], metrics=["w2"])
    found, (alone,) = differences(table, {"model.path": "Linear"})
    assert not found
    assert "no column in common: the one has scores at nfe=6, the other at nfe=4" in alone


def test_guidance_and_grid_are_axes(tmp_path):
    run = write_run(tmp_path / "a", 0, {"w2": 0.2})
    for scale in (1.0, 2.0):
        for grid in ("UniformGrid()", "SNRGrid(rho=7)"):
            write_cell(run, "euler", 4, {"w2": scale}, scale=scale, grid=grid)
    found = cells(tmp_path, EVALUATIONS)
    assert set(found.axes) >= {"guidance", "grid"}
    assert found.along("grid") == ["SNRGrid(rho=7)", "UniformGrid"]
    assert tabulate(cells(tmp_path, EVALUATIONS, guidance=["2"])).rows == ("grid",)


def test_cells_of_a_checkpoint_that_is_gone_are_left_out(tmp_path):
    run = write_run(tmp_path / "a", 0, {"w2": 0.2})
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").write_bytes(b"weights")
    digest = sha256(b"weights").hexdigest()
    write_cell(run, "euler", 4, {"w2": 0.5}, checkpoint="gone")
    write_cell(run, "euler", 4, {"w2": 0.4}, checkpoint=digest)
    collection = collect([tmp_path])
    assert [r.metrics["w2"] for r in collection.trained[0].records if r.kind == EVALUATIONS] == [0.4]  # fmt: skip
    assert "1 left out, of checkpoints that are no longer there" in collection.notes[0]


def test_a_cell_that_was_scored_before_and_after_a_renaming_counts_once(tmp_path):
    run = write_run(tmp_path / "a", 0, {"w2": 0.2})
    (run / "checkpoints").mkdir()
    with (run / "checkpoints" / "last.ckpt").open("w+b") as file:
        with zipfile.ZipFile(file, "w"):
            pass
        append_checksum(file, 100)
    digest = sha256((run / "checkpoints" / "last.ckpt").read_bytes()).hexdigest()
    old = write_cell(run, "euler", 4, {"w2": 0.5}, checkpoint=digest)
    new = write_cell(run, "euler", 4, {"w2": 0.4}, checkpoint="tensors", step=100)
    os.utime(old, (1, 1))
    collection = collect([tmp_path])
    (record,) = [r for r in collection.trained[0].records if r.kind == EVALUATIONS]
    assert record.metrics["w2"] == 0.4
    assert "1 left out, of options that were scored again later" in collection.notes[0]
    new.unlink()
    write_cell(run, "euler", 4, {"w2": 0.3}, checkpoint="earlier", step=50)
    (record,) = [r for r in collect([tmp_path]).trained[0].records if r.kind == EVALUATIONS]
    assert record.metrics["w2"] == 0.5


# -- plans ----------------------------------------------------------------------------------------


def test_a_plan_gives_axes_labels_and_order(tmp_path):
    rows = []
    for label, path in (("VP", "VariancePreserving"), ("FM", "Linear")):
        for seed in (0, 1):
            name = f"{label}-s{seed}"
            write_run(tmp_path / name, seed, {"w2": 0.2 + seed}, path=path)
            rows.append((name, {"method": label}, seed, "finished", ""))
    rows.append(("FM-s2", {"method": "FM"}, 2, "failed", "NonFiniteError: loss is nan"))
    rows.append(("FM-s3", {"method": "FM"}, 3, "waiting", ""))
    write_plan(tmp_path, {"method": ["VP", "FM"]}, rows, {"model.path": None})
    write_run(tmp_path / "stray", 7, {"w2": 9.0})
    found = collect([tmp_path])
    table = tabulate(cells_of(found, FINAL, {}))
    assert (table.rows, table.keys) == (("method",), [("VP",), ("FM",)])
    assert [(x.path.name, x.status, x.why) for x in found.left_out] == [
        ("FM-s2", "failed", "it is failed: NonFiniteError: loss is nan"),
        ("FM-s3", "waiting", "it is waiting"),
    ]
    assert any("1 runs" in note and "in no cell" in note for note in found.notes)


@pytest.mark.parametrize("word", ["request", "asked"])  # the second of older sweeps
def test_a_plan_has_the_evaluations_it_asked_for(tmp_path, word):
    run = write_run(tmp_path / "a", 0, {"w2": 0.2})
    asked = write_cell(run, "euler", 4, {"w2": 0.5})
    write_cell(run, "euler", 64, {"w2": 0.3})
    note = {"arguments": [], "files": [asked.name]}
    (run / "evaluations" / f"{word}-01234567.json").write_text(json.dumps(note))
    write_plan(tmp_path, {"model.path": ["Linear"]}, [("a", {"model.path": "Linear"}, 0, "finished", "")])  # fmt: skip
    found = collect([tmp_path])
    assert [c.values["nfe"] for c in cells_of(found, EVALUATIONS, {}).all] == [4]
    assert "1 left out, which the sweep did not request" in found.notes[0]
    assert len(cells_of(collect([run]), EVALUATIONS, {}).all) == 2  # by itself it has both


def test_runs_at_one_place_of_a_plan_that_differ_are_refused(tmp_path):
    for seed, lr in ((0, 0.001), (1, 0.1)):
        write_run(tmp_path / f"s{seed}", seed, {"w2": 0.2}, model__optimizer={"lr": lr})
    rows = [(f"s{seed}", {"model.path": "Linear"}, seed, "finished", "") for seed in (0, 1)]
    write_plan(tmp_path, {"model.path": ["Linear"]}, rows)
    with pytest.raises(ValueError, match=r"model\.optimizer\.lr \(0\.001, 0\.1\)"):
        tabulate(cells(tmp_path))


def write_sweep(folder, path, steps, scores=(0.2, 0.3)):
    """A sweep of one path, all of whose runs have another length."""
    rows = [(f"{path}-s{k}", {"model.path": path}, k, "finished", "") for k in range(len(scores))]
    for seed, w2 in enumerate(scores):
        write_run(folder / f"{path}-s{seed}", seed, {"w2": w2}, path=path, trainer__max_steps=steps)
    write_plan(folder, {"model.path": [path]}, rows)
    return folder


def test_what_sets_two_sweeps_apart_is_a_row_and_not_averaged(tmp_path):
    """Else a difference of lengths would be taken for one of paths."""
    sweeps = [
        write_sweep(tmp_path / "a", "Linear", 100),
        write_sweep(tmp_path / "b", "Trigonometric", 200),
    ]
    both = cells_of(collect(sweeps), FINAL, {})
    assert set(tabulate(both).rows) == {"model.path", "trainer.max_steps"}
    (note,) = confounded(both, tabulate(both).rows)
    assert "change together" in note
    assert "confounded" in note
    with pytest.raises(ValueError, match=r"differ in trainer\.max_steps \(100, 200\) too"):
        tabulate(both, rows=["model.path"])


def test_two_sweeps_of_the_same_axes_are_compared_by_what_sets_them_apart(tmp_path):
    sweeps = [
        write_sweep(tmp_path / name, "Linear", steps) for name, steps in (("a", 100), ("b", 200))
    ]
    both = cells_of(collect(sweeps), FINAL, {})
    with pytest.raises(ValueError, match=r"differ in trainer\.max_steps \(100, 200\) too"):
        tabulate(both, rows=["model.path"])
    assert tabulate(both, rows=["trainer.max_steps"]).keys == [(100,), (200,)]


def test_the_runs_of_a_plan_are_found_where_it_was_moved_to(tmp_path):
    write_run(tmp_path / "old" / "a", 0, {"w2": 0.2})
    write_plan(
        tmp_path / "old",
        {"model.path": ["Linear"]},
        [("a", {"model.path": "Linear"}, 0, "finished", "")],
    )
    (tmp_path / "old").rename(tmp_path / "new")
    assert len(collect([tmp_path / "new"]).trained) == 1


# -- LaTeX ----------------------------------------------------------------------------------------


def test_latex_is_whole_and_escaped(tmp_path):
    for seed in range(3):
        for path, level in (("Linear", 0.2), ("Weird_path#1 & 50%", 0.5)):
            write_run(tmp_path / f"{path[:3]}-s{seed}", seed, {"w2_half{": level + seed / 50}, path=path)  # fmt: skip
    text = latex(score_grid(tabulate(cells(tmp_path))), 1)
    lines = text.splitlines()
    columns = re.fullmatch(r"\\begin\{tabular\}\{([lr]+)\}", lines[1])[1]
    rows = [line for line in lines if line.endswith(r"\\")]
    assert all(len(re.findall(r"(?<!\\)&", row)) == len(columns) - 1 for row in rows)
    assert [line for line in lines if re.fullmatch(r"\\\w+rule", line)] == [
        r"\toprule",
        r"\midrule",
        r"\bottomrule",
    ]
    assert lines[-1] == r"\end{tabular}"
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    body = "\n".join(rows)
    assert not re.search(r"(?<!\\)[_#%]", body)
    assert r"Weird\_path\#1 \& 50\%" in body
    assert r"\textbf{0.2" in body
    assert body.count("$") % 2 == 0
    assert not re.search(r"[^\x00-\x7f]", text)  # no sign that pdflatex has not


def test_latex_takes_no_value_for_an_argument_of_the_line_break(tmp_path):
    """`\\\\ [0.9]` would be a space of 0.9 of nothing, and `\\\\ *` a star."""
    for betas in ("[0.9, 0.95]", "*"):
        write_run(tmp_path / f"{len(betas)}-s0", 0, {"w2": 0.2}, model__optimizer={"betas": betas})
    rows = latex(score_grid(tabulate(cells(tmp_path))), 1).splitlines()
    assert {row.split(" &")[0] for row in rows if " & 1 &" in row} == {"{[}0.9, 0.95]", "{*}"}
