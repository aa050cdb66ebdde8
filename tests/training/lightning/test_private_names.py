"""Private names of other libraries: what the package relies on is still there, and each stands in its one room.

A test that fails after an upgrade names what the library has dropped; the rooms say where to mend it.
"""

import ast
from functools import reduce
from importlib import import_module
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

PACKAGE = Path(__file__).parents[3] / "fmlightning"

LIGHTNING_MODULES = {
    "lightning.fabric.utilities.rank_zero": ["_get_rank"],
    "lightning.fabric.strategies.launchers.subprocess_script": ["_ChildProcessObserver"],
    "lightning.pytorch.loops.training_epoch_loop": ["_TrainingEpochLoop.advance"],
    "lightning.pytorch.loops.utilities": ["_block_parallel_sync_behavior"],
    "lightning.pytorch.cli": [
        "LightningCLI._get", "LightningCLI._parser", "LightningCLI._parse_ckpt_path",
        "LightningCLI._run_subcommand",
    ],
}  # fmt: skip
LIGHTNING_TRAINER = (
    "_val_check_time_interval", "_signal_connector.received_sigterm", "_signal_connector.register_signal_handlers",
    "_signal_connector.teardown", "_logger_connector.should_update_logs", "_logger_connector.metrics",
    "_logger_connector.on_batch_start", "_logger_connector.on_batch_end",
    "_logger_connector.update_train_step_metrics", "fit_loop._data_fetcher", "fit_loop.restarting",
    *(f"fit_loop.epoch_loop.{name}" for name in (
        "_batches_that_stepped", "_broadcast_sigterm_tensor", "_num_ready_batches_reached", "_should_accumulate",
        "_should_check_val_epoch", "_should_check_val_fx", "advance", "batch_idx", "global_step", "restarting",
        "batch_progress.total.ready", "batch_progress.total.processed", "batch_progress.total.completed",
        "batch_progress.current.ready", "batch_progress.is_last_batch", "batch_progress.increment_ready",
        "batch_progress.increment_started", "batch_progress.increment_processed",
        "batch_progress.increment_completed", "scheduler_progress.increment_ready",
        "scheduler_progress.increment_completed",
        "automatic_optimization.optim_progress.optimizer.step.increment_ready",
        "automatic_optimization.optim_progress.optimizer.step.increment_completed",
        "automatic_optimization.optim_progress.optimizer.zero_grad.increment_ready",
        "automatic_optimization.optim_progress.optimizer.zero_grad.increment_started",
        "automatic_optimization.optim_progress.optimizer.zero_grad.increment_completed",
    )),
)  # fmt: skip
"""The undocumented names that the training loop is made of, private or not."""

LIGHTNING = {
    "_get_rank", "_TrainingEpochLoop", "_block_parallel_sync_behavior", "_get", "_parser", "_parse_ckpt_path",
    "_run_subcommand", "_val_check_time_interval", "_signal_connector", "_logger_connector", "_data_fetcher",
    "_batches_that_stepped", "_broadcast_sigterm_tensor", "_num_ready_batches_reached", "_should_accumulate",
    "_should_check_val_epoch", "_should_check_val_fx", "_current_fx_name", "_child_processes", "_model_averager",
}  # fmt: skip
WANDB = {
    "_experiment", "_wandb_init",  # of Lightning's WandbLogger
    "_singleton", "_connection", "_cleanup", "_proc", "_process",
}  # fmt: skip
TORCH = {
    "_DropoutNd", "_utils", "_flatten_dense_tensors", "_foreach_add_", "_foreach_copy_", "_foreach_lerp_",
    "_foreach_mul_", "_foreach_norm", "_foreach_sub", "_step_supports_amp_scaling", "_parameters", "_modules",
    "_is_mkldnn_bf16_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported",
}  # fmt: skip
JSONARGPARSE = {"_values", "_actions", "_typehints", "_common", "_typehint", "_name_parser_map"}
PYTHON = {"_option_string_actions", "_exit", "_replace", "_asdict", "_run_exitfuncs"}

ROOMS = {
    "training/lightning/": LIGHTNING,
    "training/tracking.py": WANDB,
    "cli/": JSONARGPARSE,
    "": TORCH | PYTHON,
}
"""Where the private names of a library may stand."""


def private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


def names_in(tree):
    """The private names that a file takes from others: attributes, imports, names in `getattr`, methods it replaces."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from node.module.split(".")
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            words = (a.value for a in node.args if isinstance(a, ast.Constant))
            yield from (word for word in words if isinstance(word, str))


FILES = sorted(PACKAGE.rglob("*.py"))


def test_private_names_stand_in_their_room():
    for path in FILES:
        here = str(path.relative_to(PACKAGE))
        allowed = set().union(*(names for room, names in ROOMS.items() if here.startswith(room)))
        found = {n for n in names_in(ast.parse(path.read_text())) if private(n)}
        assert found <= allowed, (
            f"{here} uses {sorted(found - allowed)}: bring Lightning's names behind a function of "
            "training/lightning/, and list what is relied on above"
        )


def test_nothing_is_listed_that_is_not_used():
    text = "\n".join(path.read_text() for path in FILES)
    assert not [name for name in set().union(*ROOMS.values()) if name not in text]


def reached(root, name):
    """Whether an object has an attribute, through others; a property may need a run to be read."""
    owner, last = reduce(getattr, name.split(".")[:-1], root), name.rsplit(".", 1)[-1]
    return hasattr(type(owner), last) or hasattr(owner, last)


@pytest.mark.parametrize(
    ("module", "name"), [(m, name) for m, names in LIGHTNING_MODULES.items() for name in names]
)
def test_lightning_has_what_is_imported(module, name):
    assert reached(import_module(module), name), f"Lightning has dropped {module}.{name}"


@pytest.fixture(scope="module")
def trainer():
    return Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)


@pytest.mark.parametrize("name", LIGHTNING_TRAINER)
def test_lightnings_trainer_has_what_is_relied_on(trainer, name):
    assert reached(trainer, name), f"Lightning has dropped trainer.{name}"


def test_lightnings_module_and_observer_have_what_is_relied_on():
    assert hasattr(LightningModule(), "_current_fx_name")
    observer = import_module(
        "lightning.fabric.strategies.launchers.subprocess_script"
    )._ChildProcessObserver(0, [])
    assert observer._child_processes == []
    # by which `peers` finds it
    assert (
        'name="child-process-observer"'
        in Path(import_module(type(observer).__module__).__file__).read_text()
    )


def test_torch_has_what_is_relied_on():
    lists = {name for name in TORCH if name.startswith("_foreach")}
    assert not [name for name in lists if not hasattr(torch, name)]
    assert hasattr(import_module("torch._utils"), "_flatten_dense_tensors")
    assert issubclass(nn.Dropout, import_module("torch.nn.modules.dropout")._DropoutNd)
    assert {"_parameters", "_modules"} <= vars(nn.Linear(1, 1)).keys()
    fused = torch.optim.Adam([torch.zeros(1, requires_grad=True)], fused=True)
    assert fused._step_supports_amp_scaling is True
    # each is asked for where it is there: another torch may lack one
    assert hasattr(torch.cpu, "_is_avx512_bf16_supported") or hasattr(
        torch.cpu, "_is_amx_tile_supported"
    )


def test_wandb_has_what_is_relied_on():
    """None of it is needed by a run that goes well: it is how a mirror is left that does not answer."""
    from lightning.pytorch.loggers import WandbLogger
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib import import_hooks, module
    from wandb.sdk.lib.service import service_token

    assert hasattr(wandb_setup, "_singleton")
    assert callable(module.unset_globals)
    assert callable(service_token.clear_service_in_env)
    assert callable(import_hooks.unregister_all_post_import_hooks)
    logger = WandbLogger(offline=True)
    assert logger._experiment is None
    assert "mode" in logger._wandb_init or isinstance(logger._wandb_init, dict)
