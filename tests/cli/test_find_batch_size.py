"""The search for the largest batch, on memories that are known, and the command on a small config."""

import pytest

from fmlightning.cli.find_batch_size.command import BatchSizeSearch, parse, size, verdict
from fmlightning.cli.find_batch_size.search import Trial, largest, search

GIB = 2**30


def machine(base, each, memory, bumps=0.0):
    """A memory that grows with the batch, with steps of an allocator, and what does not fit into it."""
    tried = []

    def measure(batch):
        tried.append(batch)
        peak = int(base + each * batch * (1 + bumps * (batch % 3)))
        return Trial(batch, peak, 100.0, None if peak <= memory else "too large")

    return measure, tried


CASES = {
    "a network for images": (2e9, 40e6, 16e9, 0.0),
    "no base": (0.0, 1e6, 1e9, 0.0),
    "small samples": (6e8, 1e3, 1e9, 0.0),
    "large samples": (5e9, 1.5e9, 80e9, 0.0),
    "an allocator's steps": (2e9, 30e6, 16e9, 0.1),
}


@pytest.mark.parametrize("first", [8, 128, 100_000])
@pytest.mark.parametrize("case", CASES)
def test_it_ends_within_a_sixteenth_of_the_largest_that_fits(case, first):
    base, each, memory, bumps = CASES[case]
    measure, tried = machine(base, each, memory, bumps)
    best = largest(list(search(measure, first, 8, memory)))
    most = (memory - base) / each
    assert best.batch % 8 == 0
    assert best.peak <= memory
    # of the bumpy one a third of the batches takes a fifth more
    assert best.batch >= (most / (1 + 2 * bumps)) * (1 - 1 / 16) - 8
    assert len(tried) == len(set(tried)) <= 20


def test_from_a_batch_that_fits_nothing_is_tried_that_is_known_not_to():
    measure, tried = machine(2e9, 40e6, 16e9)
    list(search(measure, 32, 8, 16e9))
    assert all(2e9 + 40e6 * batch <= 16e9 for batch in tried)
    assert len(tried) <= 5


def test_a_memory_that_holds_no_batch():
    measure, tried = machine(2e9, 40e6, 1e9)
    trials = list(search(measure, 64, 8, 1e9))
    assert largest(trials) is None
    assert tried == [64, 16, 8] or tried == [64, 16, 8][: len(tried)]


def test_no_batch_is_larger_than_the_data():
    measure, tried = machine(1e9, 1e5, 80e9)
    best = largest(list(search(measure, 96, 8, 80e9, cap=1297)))
    assert best.batch == 1296
    assert max(tried) == 1296
    with pytest.raises(ValueError, match="5 training samples"):
        list(search(measure, 8, 8, 80e9, cap=5))


def test_batches_are_multiples_for_all_processes():
    measure, tried = machine(1e9, 1e7, 8e9)
    list(search(measure, 100, 24, 8e9))
    assert all(batch % 24 == 0 for batch in tried)


@pytest.mark.parametrize(
    ("text", "count"),
    [("8GiB", 8 * GIB), ("500MB", 5 * 10**8), ("1.5G", 15 * 10**8), ("4e9", 4 * 10**9)],
)
def test_sizes_are_read(text, count):
    assert size(text) == count


@pytest.mark.parametrize("argv", [["--memory=8Q"], ["--memory=0"], ["--multiple=0"], []])
def test_bad_options_are_refused(argv):
    with pytest.raises(ValueError, match=r"memory|multiple|config"):
        parse([*argv, *(["--config=x"] if argv else [])])


def test_the_verdict_names_the_batch_of_all_processes_and_where_speed_ends():
    where = BatchSizeSearch([], 8 * GIB, 64, 4, "a card", 0, None)
    trials = [Trial(64, GIB, 500.0), Trial(128, 2 * GIB, 990.0), Trial(256, 3 * GIB, 1000.0),
              Trial(512, None, None, "out of memory")]  # fmt: skip
    words = verdict(trials, where)
    assert "--data.batch_size 256, 64 for each of 4 processes" in words
    assert "from 128 on" in words
    assert "no batch fits" in verdict(trials[-1:], where)
    process = BatchSizeSearch([], GIB, 64, 1, "the CPU", GIB, None, held=2 * GIB)
    assert "takes 2.00 GiB before its first step: name more with --memory" in verdict(
        trials[-1:], process
    )


SMALL = (
    "--config", "configs/toy/mixture.yaml", "--model.network.width=8", "--trainer.accelerator=cpu",
)  # fmt: skip


@pytest.mark.slow
def test_a_wrong_config_is_told_before_any_trial(command):
    result = command("find_batch_size", *SMALL, "--model.class_dropout_prob=0.5")
    assert result.returncode == 2
    assert "class_dropout_prob" in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_budget_is_kept_and_nothing_is_written(command, tmp_path):
    """2,048 more samples of eight numbers are nothing beside the libraries: the budget lies just above those."""
    run = tmp_path / "run"
    result = command(
        "find_batch_size",
        *SMALL,
        f"--run_dir={run}",
        "--memory=100MiB",
        "--data.batch_size=16",
        timeout=600,
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert "no batch fits into 100 MiB of the CPU" in result.stdout
    assert not run.exists()
    result = command(
        "find_batch_size", *SMALL, f"--run_dir={run}", "--memory=64GiB", "--data.batch_size=16",
        "--config=configs/trainer/cpu2.yaml", "--data.train_size=64", timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "for each of 2 processes" in result.stdout
    assert "samples/s" in result.stdout
    assert not run.exists()
