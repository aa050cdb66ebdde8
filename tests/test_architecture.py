"""What the layout promises beyond the layers that `make lint` holds: what imports without what, and stable names."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from jsonargparse._util import get_import_path

PACKAGE = Path(__file__).parent.parent / "fmlightning"
FACADES = ("flow", "nets", "data", "metrics", "training")
OUTSIDE_FLOW = {"torch", "torchdiffeq", "scipy", "ot", "jaxtyping", "lazy_loader"}


def imports(path):
    """The packages imported anywhere in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def modules(*rooms):
    paths = [
        p.relative_to(PACKAGE.parent) for room in rooms for p in (PACKAGE / room).rglob("*.py")
    ]
    return sorted(".".join(p.with_suffix("").parts).removesuffix(".__init__") for p in paths)


@pytest.mark.parametrize("path", sorted((PACKAGE / "flow").rglob("*.py")), ids=lambda p: p.stem)
def test_flow_knows_only_its_libraries(path):
    assert set(imports(path)) - {"fmlightning"} - set(sys.stdlib_module_names) <= OUTSIDE_FLOW


def test_the_top_floor_has_eight_folders():
    inside = {p.name for p in PACKAGE.iterdir()} - {"__pycache__"}
    files = {name for name in inside if "." in name}
    assert files == {"__init__.py", "__main__.py", "py.typed"}
    assert inside - files == {
        "flow",
        "runs",
        "nets",
        "metrics",
        "data",
        "training",
        "cli",
        "studies",
    }


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("rooms", "absent"),
    [
        (("flow", "nets"), ("lightning", "pytorch_lightning", "wandb", "jsonargparse")),
        (("runs", "studies/report"), ("torch", "lightning", "jsonargparse")),
    ],
    ids=["the mathematics without Lightning", "run directories without torch"],
)
def test_rooms_work_where_a_package_does_not_exist(rooms, absent):
    blocked = "import sys; sys.modules.update(dict.fromkeys({}, None)); import {}"
    result = run(blocked.format(absent, ", ".join(modules(*rooms))))
    assert result.returncode == 0, result.stderr


QUICK = (
    ["--help"],
    ["--version"],
    ["ls", "runs"],
    ["show", "nowhere"],
    ["report", "nowhere"],
    ["report", "--help"],
    ["fitt"],
)


@pytest.mark.parametrize("argv", QUICK, ids=" ".join)
def test_commands_without_a_model_import_neither_torch_nor_lightning(argv):
    code = (
        "import sys; from fmlightning.__main__ import main; "
        f"main({argv!r}); "
        "assert not {'torch', 'lightning', 'wandb', 'jsonargparse'} & set(sys.modules), 'heavy'"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", FACADES)
def test_public_classes_are_named_by_their_facade(name):
    facade = import_module(f"fmlightning.{name}")
    assert facade.__all__, "an empty facade"
    for public in facade.__all__:
        found = getattr(facade, public)
        if isinstance(found, type):
            assert get_import_path(found) == f"fmlightning.{name}.{public}"
        inside = PACKAGE / name / public
        assert not inside.exists(), f"{public} is a folder too"
        assert not inside.with_suffix(".py").exists(), f"{public} is a module too"


def test_a_class_that_moves_keeps_its_name(monkeypatch):
    """The name is what configs and checkpoints say, and what the name of a run directory is hashed from."""
    from fmlightning.flow import Linear

    elsewhere = ModuleType("fmlightning.flow.elsewhere")
    elsewhere.Linear = Linear
    monkeypatch.setitem(sys.modules, elsewhere.__name__, elsewhere)
    monkeypatch.setattr(Linear, "__module__", elsewhere.__name__)
    assert get_import_path(Linear) == "fmlightning.flow.Linear"


@pytest.mark.parametrize("name", FACADES)
def test_a_facade_imports_nothing_until_it_is_used(name):
    assert run(f"import sys, fmlightning.{name}; assert 'torch' not in sys.modules").returncode == 0


@pytest.mark.parametrize("word", ["randn(", "rand(", "randint(", "randperm("])
def test_nothing_draws_from_the_global_generator(word):
    """Every draw of ours names its generator (keyed streams draw by counter)."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == f"torch.{word[:-1]}":
                keywords = {k.arg for k in node.keywords}
                assert "generator" in keywords or None in keywords, f"{path.name}:{node.lineno}"
