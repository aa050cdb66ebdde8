"""`metrics.csv` as it is read: complete rows only, and corrupt ones refused."""

import pytest

from fmlightning.runs.metrics_csv import LAST_BYTES, last_step, read_columns, read_rows
from fmlightning.training.metrics_file import MetricsFile


@pytest.mark.parametrize(
    ("text", "step"),
    [(None, 0), ("", 0), ("step,a\n", 0), ("step,a\n9,1.0\n", 9), ("step,a\n9,1.0\n19,", 9)],
)
def test_the_last_step_is_that_of_the_last_complete_row(tmp_path, text, step):
    path = tmp_path / "metrics.csv"
    if text is not None:
        path.write_text(text)
    assert last_step(path) == step
    assert read_columns(path) == ({"a": [(9, 1.0)]} if step else {})


def test_a_long_file_is_read_from_its_end(tmp_path):
    rows = LAST_BYTES // 4
    text = "step,a\r\n" + "".join(f"{10 * n},0.5\r\n" for n in range(rows + 1))
    (tmp_path / "metrics.csv").write_text(text, newline="")
    assert last_step(tmp_path / "metrics.csv") == 10 * rows


def test_what_the_logger_writes_is_read_back_to_the_bit(tmp_path):
    logger = MetricsFile(tmp_path)
    values = [0.1 + 0.2, 1e-310, float("inf"), -0.0]
    for step, value in enumerate(values):
        logger.log_metrics({"train/loss": value}, 10 * step)
    logger.log_metrics({"eval/w2": 3.5}, 20)  # a column more: the file is written anew
    columns = read_columns(tmp_path / "metrics.csv")
    assert columns["train/loss"] == [(10 * step, value) for step, value in enumerate(values)]
    assert columns["eval/w2"] == [(20, 3.5)]
    names, rows = read_rows(tmp_path / "metrics.csv")
    assert names == ["step", "train/loss", "eval/w2"]
    assert rows[0]["eval/w2"] == ""


CORRUPT = {
    "no number": "step,a\n1,x\n",
    "no step": "a,b\n1,2\n",
    "a value too many": "step,a\n1,2,3\n",
    "a value too few": "step,a,b\n1,2\n",
    "bytes": "step,a\n1,\udcff\n",
}


@pytest.mark.parametrize("text", CORRUPT.values(), ids=CORRUPT)
def test_a_corrupt_file_is_refused(tmp_path, text):
    path = tmp_path / "metrics.csv"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"metrics\.csv is damaged"):
        read_columns(path)
