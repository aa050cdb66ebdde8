"""One grammar for all commands: a file each, snake_case, and flags that may stand without a value."""

import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import yaml

from fmlightning.__main__ import COMMANDS, HELP
from fmlightning.cli.argparser import Parser
from fmlightning.cli.flags import with_values

MOONS = ("fit", "--config", "configs/toy/moons.yaml")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_found_by_its_name(command):
    module, _ = COMMANDS[command].split(":")
    assert find_spec(module)
    assert command in module.split(".") or module == "fmlightning.cli.fit"
    assert re.search(rf"^  (\w+ \| )?{command}\b", HELP, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_written_with_underscores(command, fmlightning, capsys):
    with pytest.raises(SystemExit):
        fmlightning(command, "--help")
    shown = capsys.readouterr().out
    assert "--" in shown
    hyphenated = set(re.findall(r"--\w+-[\w-]+", shown))
    assert not hyphenated


WRITTEN = {
    "alone": (["--rerun"], ["--rerun=true"]),
    "before an option": (["--rerun", "--n", "3"], ["--rerun=true", "--n", "3"]),
    "before a positional": (["--rerun", "runs/x"], ["--rerun=true", "runs/x"]),
    "off": (["--no_rerun", "x"], ["--rerun=false", "x"]),
    "with its value": (["--rerun", "false"], ["--rerun", "false"]),
    "as in YAML": (["--rerun", "True"], ["--rerun", "True"]),
    "joined": (["--rerun=false"], ["--rerun=false"]),
    "another option": (["--no_such", "--n"], ["--no_such", "--n"]),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_flag_gets_its_value(name):
    words, expected = WRITTEN[name]
    assert list(with_values(words, {"--rerun"})) == expected


@pytest.mark.parametrize(
    ("words", "wanted"), [([], False), (["--wait"], True), (["--no_wait"], False)]
)
def test_flags_of_the_commands_without_torch(words, wanted):
    parser = Parser("sweep", "")
    parser.add_flag("--wait", "wait")
    assert parser.parse_args(words).wait is wanted


def test_flags_of_the_commands_with_torch(command):
    words = ("--rerun", "--no_init_ema", "--model.compile", "--samples.at_end", "false")
    config = yaml.safe_load(command(*MOONS, *words, "--print_config").stdout)
    assert config["rerun"] is True
    assert config["init_ema"] is False
    assert config["model"]["compile"] is True
    assert config["samples"]["at_end"] is False


def test_commands_that_need_no_model_start_without_torch():
    code = (
        "import sys; from fmlightning.__main__ import main\n"
        "for name in ('ls', 'show', 'report', 'sweep', 'ema', 'export', 'reproduce', 'doctor'):\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit: pass\n"
        "assert not {'torch', 'lightning', 'wandb', 'jsonargparse'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
