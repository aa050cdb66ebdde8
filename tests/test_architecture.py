"""Who may import whom, and what starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fmlightning"
LIGHTNING_LINE = ("data", "training", "callbacks", "runs", "cli", "sample", "report")
OUTSIDE_FLOW = {"torch", "torchdiffeq", "scipy", "ot", "jaxtyping"}
ALLOWED = {
    "flow": {"flow"},
    "nets": {"nets", "flow"},
    "metrics": {"metrics", "flow"},
    "plotting": {"plotting", "flow"},
    "data": {"data", "metrics", "nets", "flow"},
    "training": {"training", "data", "metrics", "flow", "runs", "signals"},
    "callbacks": {
        "callbacks",
        "secrecy",
        "training",
        "data",
        "metrics",
        "plotting",
        "nets",
        "flow",
        "runs",
    },
    "report": {"report", "runs", "commands", "comparison", "training"},
    "commands": set(),
    "listing": {"commands", "report", "runs"},
    "showing": {"commands", "report", "runs", "training"},
}


def imports(path):
    """Modules imported anywhere in a file, as (root, room of fmlightning or None)."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            parts = name.split(".")
            yield parts[0], parts[1] if parts[0] == "fmlightning" and len(parts) > 1 else None


def files(room):
    path = PACKAGE / room
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_downwards_only(room):
    for path in files(room):
        rooms = {inner for _, inner in imports(path) if inner}
        assert rooms <= ALLOWED[room], f"{path.name} imports {rooms - ALLOWED[room]}"


@pytest.mark.parametrize("path", files("flow"), ids=lambda p: p.stem)
def test_flow_knows_only_its_libraries(path):
    roots = {root for root, _ in imports(path)} - {"fmlightning"} - set(sys.stdlib_module_names)
    assert roots <= OUTSIDE_FLOW


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_flow_and_nets_work_where_lightning_does_not_exist():
    paths = [p.relative_to(PACKAGE.parent) for p in (*files("flow"), *files("nets"))]
    modules = [".".join(p.with_suffix("").parts) for p in paths if p.stem != "__init__"]
    blocked = "import sys; sys.modules['lightning'] = sys.modules['pytorch_lightning'] = sys.modules['wandb'] = None; "
    result = run(blocked + "import " + ", ".join(modules))
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


@pytest.mark.parametrize("word", ["randn(", "rand(", "randint(", "randperm("])
def test_nothing_draws_from_the_global_generator(word):
    """Every draw of ours names its generator (Rows draws by counter)."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == f"torch.{word[:-1]}":
                keywords = {k.arg for k in node.keywords}
                assert "generator" in keywords or None in keywords, f"{path.name}:{node.lineno}"
