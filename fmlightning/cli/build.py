"""Objects from a resolved config: the module and the data."""

from typing import Any

from fmlightning.cli.parser import FlowParser
from fmlightning.data.module import FlowData
from fmlightning.training.module import FlowMatching


def instantiate_model(config: dict[str, Any]) -> FlowMatching:
    """The untrained module of a resolved config."""
    parser = FlowParser()
    parser.add_lightning_class_args(FlowMatching, "model")
    options = parser.parse_object({"model": {**config["model"], "seed": config["seed_everything"]}})
    return parser.instantiate(options).model


def instantiate_data(config: dict[str, Any]) -> FlowData:
    """The data of a resolved config."""
    parser = FlowParser()
    parser.add_subclass_arguments(FlowData, "data")
    data = config["data"]
    arguments = {**(data.get("init_args") or {}), "seed": config["seed_everything"]}
    options = parser.parse_object({"data": {**data, "init_args": arguments}})
    return parser.instantiate(options).data
