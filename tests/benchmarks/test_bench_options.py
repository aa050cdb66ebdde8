"""The options that benchmarks give to `fit` are options of today; a benchmark itself runs for minutes."""

import loop
import ot_cfm
import pytest

OPTIONS = {
    "ot_cfm, points": ot_cfm.POINTS,
    "ot_cfm, images": ot_cfm.IMAGES,
    **{
        f"loop, {name}": (f"--config=configs/{case.config}.yaml", *case.options)
        for name, case in loop.CASES.items()
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_fit_knows_every_option(fmlightning, repository, monkeypatch, capsys, options):
    monkeypatch.chdir(repository)
    with pytest.raises(SystemExit, match="0"):
        fmlightning("fit", *options, *loop.COMMON, "--print_config")
    assert "class_path" in capsys.readouterr().out
