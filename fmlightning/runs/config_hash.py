"""The part of a config that changes the result, and its digest: the name of a run."""

import hashlib
import json
from typing import Any

RESULT_KEYS = ("seed_everything", "model", "data", "ema")


RESULT_TRAINER_KEYS = (
    "max_steps",
    "max_epochs",
    "accumulate_grad_batches",
    "precision",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
    "overfit_batches",
    "fast_dev_run",
)


NOT_A_RESULT = (
    "solver",
    "guidance",
    "compile",
    "channels_last",
    "prefetch",
    "ahead",  # its name in an earlier version
    "snapshots",
    "eval_batch_size",
    "num_workers",
    "in_memory",
    "root",
    "download",
)

AS_BEFORE = {"background": None, "has_splits": None, "two_times": False}
"""Options that are younger than some runs: these values are what those were trained with, and change no name."""

NEITHER = object()


def config_hash(config: dict[str, Any]) -> str:
    """Eight hexadecimal digits for everything in a resolved config that changes the result of training."""
    text = json.dumps(result_parts(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def result_parts(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved config that changes the result of training."""
    kept = {key: prune(config.get(key)) for key in RESULT_KEYS}
    trainer = config.get("trainer") or {}
    kept["trainer"] = {key: trainer.get(key) for key in RESULT_TRAINER_KEYS}
    if config.get("init_digest"):  # not the path: where the weights lay does not matter
        kept["init_digest"] = config["init_digest"]
    kept["trainer"] |= {key: trainer[key] for key in ("max_time", "callbacks") if trainer.get(key)}
    return kept


def prune(value: Any) -> Any:
    """A config without what only says where or how fast."""
    if isinstance(value, dict):
        return {
            k: prune(v)
            for k, v in value.items()
            if k not in NOT_A_RESULT and v is not AS_BEFORE.get(k, NEITHER)
        }
    return value
