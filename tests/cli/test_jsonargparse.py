"""The private names of jsonargparse that the command line stands on: a version that loses one fails here, by name."""

import pathlib
import tomllib
from importlib.metadata import version
from typing import Any

import pytest
from jsonargparse import ArgumentParser, Namespace, _actions, _typehints, _util
from jsonargparse._common import parser_context

from fmlightning.cli.jsonargparse_internals import all_actions, type_of, values
from fmlightning.cli.parser import FlowParser
from fmlightning.flow import Linear, Path


def test_the_version_is_one_that_pyproject_allows(repository):
    dependencies = tomllib.loads((repository / "pyproject.toml").read_text())["project"][
        "dependencies"
    ]
    (pin,) = (each for each in dependencies if each.startswith("jsonargparse"))
    assert pin.endswith(">=4.53,<4.54")
    assert version("jsonargparse").startswith("4.53.")


@pytest.mark.parametrize("module", [_typehints, _actions])
def test_what_a_value_names_is_imported_by_a_name_of_the_module(module):
    assert module.import_object is not _util.import_object, "not guarded"
    assert module.import_object.__wrapped__ is _util.import_object


def test_there_is_no_other_way_to_import_what_a_value_names():
    """Beside the two that are guarded: types that code registers, completion, and a mixin that nothing here uses."""
    folder = pathlib.Path(_util.__file__).parent
    found = {path.stem for path in folder.glob("*.py") if "import_object" in path.read_text()}
    others = {"typing", "_completions", "_completions_jsonschema", "_from_config"}
    assert found == {"_util", "_typehints", "_actions", *others}


def test_a_class_that_takes_another_s_place_forgets_its_arguments():
    assert _typehints.discard_init_args_on_class_path_change.__name__ == "change"
    parser = FlowParser()
    parser.add_argument("--path", type=Path, default=Linear(0.5))
    words = ["--path=IndependentCFM", "--path.sigma_min=0.5"]
    with pytest.raises(ValueError, match="sigma_min"):
        parser.parse_args(words)


def test_options_have_the_type_of_their_hint():
    parser = ArgumentParser()
    parser.add_argument("--count", type=int | None)
    (action,) = (a for a in all_actions(parser) if a.dest == "count")
    assert type_of(action) == int | None
    assert "--count" in action.option_strings


def test_options_of_a_subcommand_are_found():
    parser, inner = ArgumentParser(), ArgumentParser()
    inner.add_argument("--count", type=int)
    parser.add_subcommands().add_subcommand("fit", inner)
    assert "count" in {action.dest for action in all_actions(parser)}


def test_values_inside_of_a_class_are_found():
    parser = FlowParser()
    parser.add_argument("--path", type=Path)
    found: dict[str, Any] = {}
    for name, _, value in values(
        parser, parser.parse_args(["--path=Linear", "--path.sigma_min=0.25"])
    ):
        found[name] = value
    assert isinstance(found["path"], Namespace)
    assert found["path.sigma_min"] == 0.25


def test_a_parser_of_a_class_is_made_in_the_context_of_its_parent():
    with parser_context(parent_parser=FlowParser()):
        parser = _typehints.ActionTypeHint.get_class_parser("fmlightning.flow.Linear")
    assert isinstance(parser, FlowParser)
