"""The page of the doctor: all of the machine, no secret, and a status that means something."""

import hashlib
import os
import re

import pytest

from fmlightning.cli import doctor
from fmlightning.cli import resume_check as rehearsal
from fmlightning.cli.doctor import Line, installed, public
from fmlightning.metrics.features.networks import WEIGHTS

MARKS = ("ok", "note", "FAIL")
QUICK = ("doctor", "--no_training")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home directory of its own, with nothing in it."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("NETRC", raising=False)
    return folder


def lines(shown):
    """The findings by name: (mark, words). A line that begins with blanks goes on with the one before."""
    shown = re.sub(r"\n {10,}", " ", shown)
    found = (
        re.match(rf"({'|'.join(MARKS)}) +(\S+(?: \d)?) +(.*)", line) for line in shown.splitlines()
    )
    return {m[2]: (m[1], m[3]) for m in found if m}


def test_the_page_says_what_is_here(fmlightning, home):
    status, shown = fmlightning(*QUICK)
    assert status == 0, shown
    found = lines(shown)
    names = {"fmlightning", "python", "system", "packages", "torch", "CPU", "memory", "processes", "W&B", "Inception",
             "data", "runs"}  # fmt: skip
    assert names <= found.keys()
    assert "training" not in found
    for package in ("torch", "lightning", "jsonargparse", "pot"):
        assert f"{package} {installed(package)}" in found["packages"][1]
    assert f"{os.cpu_count()} cores" in found["CPU"][1]
    assert "1797 digits" in found["data"][1]
    assert found["Inception"][0] == "note"
    # plain text on one page
    assert "\x1b" not in shown
    assert len(shown.splitlines()) < 40
    assert not list(home.rglob("*")), "something was written"


def test_no_secret_and_no_home_on_the_page(fmlightning, home, monkeypatch):
    secrets = {"WANDB_API_KEY": "a1" * 20, "HF_TOKEN": "hf_b2b2b2b2", "MY_PASSWORD": "c3c3c3c3"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_BASE_URL", f"https://user:{secrets['MY_PASSWORD']}@wandb.example")
    weights = home / "weights.pth"
    weights.write_bytes(b"weights")
    monkeypatch.setenv("FMLIGHTNING_INCEPTION", str(weights))
    status, shown = fmlightning(*QUICK, "--runs_root", home / secrets["HF_TOKEN"])
    assert status == 0, shown
    assert not [value for value in secrets.values() if value in shown]
    assert str(home) not in shown
    found = lines(shown)
    assert "auto is online, a key in $WANDB_API_KEY, server wandb.example" in found["W&B"][1]
    mark, words = found["Inception"]
    assert f"~/weights.pth, sha256 {hashlib.sha256(b'weights').hexdigest()}" in words
    assert mark == "note"  # the file is not the one that others have
    assert WEIGHTS in words


def test_a_key_in_netrc_is_found_and_not_shown(fmlightning, home, monkeypatch):
    (home / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password d4d4d4d4\n")
    (home / ".netrc").chmod(0o600)
    monkeypatch.delenv("WANDB_MODE")
    _, shown = fmlightning(*QUICK)
    assert "auto is online, a key in netrc" in lines(shown)["W&B"][1]
    assert "d4d4d4d4" not in shown


BROKEN = {
    # what is wrong: the line that fails, and the remedy
    "mode": ({"WANDB_MODE": "sometimes"}, "W&B", "choose online, offline or disabled"),
    "weights": ({"FMLIGHTNING_INCEPTION": "nowhere.pth"}, "Inception", "unset FMLIGHTNING_INCEPTION"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_training_needs_fails_with_a_remedy(fmlightning, home, monkeypatch, name):
    variables, what, remedy = BROKEN[name]
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    status, shown = fmlightning(*QUICK)
    assert status == 1
    mark, words = lines(shown)[what]
    assert mark == "FAIL"
    assert remedy in words
    assert shown.splitlines()[-1] == f"failed: {what}"


def test_a_runs_root_that_cannot_be_written_fails(fmlightning, home, tmp_path):
    (tmp_path / "file").write_text("")
    status, shown = fmlightning(*QUICK, "--runs_root", tmp_path / "file" / "runs")
    assert status == 1
    assert lines(shown)["runs"][0] == "FAIL"
    assert "$FMLIGHTNING_RUNS" in lines(shown)["runs"][1]
    assert [p.name for p in tmp_path.iterdir() if p.name != "home"] == ["file"]


def test_packages_are_held_against_what_is_required(monkeypatch):
    required = ["torch>=99", "nothing-like-this", "lightning", "pytest>=99; extra == 'dev'"]
    monkeypatch.setattr(doctor, "requires", lambda _: required)
    first, *wrong = doctor.check_packages()
    assert not first.remedy
    assert {line.remedy for line in wrong} == {
        "pip install 'torch>=99'",
        "pip install 'nothing-like-this'",
    }
    assert all(line.mark == "FAIL" for line in wrong)


def test_a_check_that_breaks_does_not_stop_the_others(fmlightning, home, monkeypatch):
    def breaks():
        yield Line("first", "fine")
        raise RuntimeError("operator torchvision::nms does not exist\nsecond line")

    monkeypatch.setattr(doctor, "CHECKS", {"breaks": breaks, "CPU": doctor.check_cpu})
    status, shown = fmlightning(*QUICK)
    assert status == 1
    assert lines(shown)["breaks"][0] == "FAIL"
    assert "RuntimeError: operator torchvision::nms does not exist second line" in shown
    assert lines(shown)["first"][0] == lines(shown)["CPU"][0] == "ok"


def test_the_launcher_is_seen_and_only_the_first_process_speaks(fmlightning, home, monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", {"processes": doctor.check_processes})
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert "SLURM: SLURM_JOB_ID=4711 SLURM_PROCID=0" in fmlightning(*QUICK)[1]
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert fmlightning(*QUICK) == (0, "")
    # and the short run is none of theirs
    assert not [name for name in rehearsal.alone() if name.startswith("SLURM")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("{home}/a", "~/a"), ("in {home}", "in ~"), ("{home}stead/a", "{home}stead/a"), ("/a{home}", "/a~")],
)  # fmt: skip
def test_the_home_directory_is_a_tilde(home, text, expected):
    assert public(text.format(home=home)) == expected.format(home=home)


@pytest.mark.parametrize(
    ("outcome", "mark", "words"),
    [
        (rehearsal.ResumeCheck(69, (), 20.0), "ok", "bit for bit"),
        (rehearsal.ResumeCheck(69, ("weights", "EMA"), 20.0), "FAIL", "weights, EMA are not those"),
        (rehearsal.Failed("exit status 2: error: no"), "FAIL", "error: no"),
        (rehearsal.TooLate(), "note", "before it was killed"),
    ],
    ids=["same", "differs", "fails", "too late"],
)
def test_what_the_short_run_says(fmlightning, home, monkeypatch, outcome, mark, words):
    def rehearse(accelerator):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(rehearsal, "rehearse", rehearse)
    monkeypatch.setattr(doctor, "CHECKS", {})
    status, shown = fmlightning("doctor")
    assert status == (mark == "FAIL")
    assert lines(shown)["training"][0] == mark
    assert words in lines(shown)["training"][1]


@pytest.mark.slow
def test_a_short_run_is_killed_and_resumed_bit_for_bit(command, home, tmp_path):
    """The real thing: five processes, and nothing of them is left."""
    result = command("doctor", timeout=1200)
    assert result.returncode == 0, result.stdout + result.stderr
    mark, words = lines(result.stdout)["training"]
    assert mark in ("ok", "note"), words  # `note` where the machine was too busy to kill it in time
    assert "bit for bit" in words or "before it was killed" in words
    assert "." in result.stderr  # that it goes on
    assert not list(home.rglob("*.ckpt"))


@pytest.mark.slow
def test_a_short_run_that_cannot_train_says_why(monkeypatch):
    with pytest.raises(rehearsal.Failed, match="exit status 2: error: "):
        rehearsal.rehearse("no such accelerator")


@pytest.mark.parametrize(
    ("text", "step"),
    [(None, 0), ("", 0), ("step,a\n", 0), ("step,a\n9,1.0\n", 9), ("step,a\n9,1.0\n19,", 9)],
)
def test_what_a_run_has_logged_is_read_from_its_file(tmp_path, text, step):
    if text is not None:
        (tmp_path / "metrics.csv").write_text(text)
    assert rehearsal.last_step(tmp_path / "metrics.csv") == step
