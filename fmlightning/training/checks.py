"""What is refused before any training, because data, model and options do not fit."""

import inspect
import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from fmlightning.data.module import FlowData
from fmlightning.flow.keys import Key
from fmlightning.flow.models import evaluate
from fmlightning.flow.paths.path import Path
from fmlightning.flow.sources import Gaussian, Source

if TYPE_CHECKING:
    from fmlightning.training.module import FlowMatching


def check_data(module: "FlowMatching", data: FlowData, given: Source) -> None:
    """Refuse what does not fit the data, whose shapes the module has already.

    Args:
        given: the source of the config, which the data may replace.

    Raises:
        ValueError: an option of the model and the data do not fit.
    """
    check_coupling(module, data)
    if module.recipe.source.paired:
        check_paired(module, data, given)
    module.recipe.objective.check(module.recipe, module.network, data)
    if module.class_dropout_prob and not module.num_classes:
        raise ValueError(
            f"model.class_dropout_prob={module.class_dropout_prob} hides labels, and {type(data).__name__} has none: "
            "set it to 0"
        )
    module.solver.check(module.guided)  # guidance refuses a model without labels
    check_optimizer(module)
    module.recipe.source.check((1, *module.event_shape))
    check_network(module, type(data).__name__)


def check_coupling(module: "FlowMatching", data: FlowData) -> None:
    """Let the data bring x0 with x1, where they are paired.

    Raises:
        ValueError: they cannot be paired as the coupling says.
    """
    coupling, batch_size = module.recipe.coupling, module.batch_size
    if coupling.identity:
        data.pool_size, data.pair = 0, None
        return
    size = coupling.ot_batch_size or batch_size
    if size > batch_size and size % batch_size:
        raise ValueError(
            f"model.coupling.ot_batch_size={size} must be a multiple of data.batch_size={batch_size}, or smaller than "
            "it"
        )
    data.pool_size, data.pair = max(size, batch_size), module.pair
    if coupling.fitted and not data.paired:
        data.require_fixed_set()


def check_paired(module: "FlowMatching", data: FlowData, given: Source) -> None:
    """Refuse options that speak of another x0 than the one that comes with the data."""
    name, coupling = type(data).__name__, module.recipe.coupling
    if not coupling.identity:
        raise ValueError(
            f"model.coupling={coupling}: each x0 of {name} belongs to the x1 beside it and is not paired anew; set "
            "model.coupling=Independent"
        )
    if given != Gaussian() and not given.paired:
        raise ValueError(
            f"model.source={given}: x0 comes with {name}, so no source is drawn from; leave it out"
        )


def check_optimizer(module: "FlowMatching") -> None:
    """Build the optimiser and the schedule once, for what they refuse."""
    parameters = module.trained_parameters
    if not parameters:  # an oracle has none, and can be validated all the same
        return
    optimizer = module.optimizer(parameters)
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise ValueError(
            "model.optimizer=SparseAdam takes sparse gradients, and these are dense: take Adam or AdamW"
        )
    if module.scheduler is not None:
        module.scheduler(optimizer)


def check_network(module: "FlowMatching", data: str) -> None:
    """Call coupling and network once, on two samples."""
    x = torch.zeros(2, *module.event_shape, device=module.device)
    last = module.num_classes - 1
    y = torch.full((2,), last, device=module.device) if module.num_classes else None
    module.recipe.coupling.pairs(x, x, y, Key(0).generator())
    network, training = module.network, module.network.training
    name = f"model.network {type(network).__name__}"
    if "rows" in inspect.signature(network.forward).parameters:
        raise ValueError(
            f"{name} takes rows, which are called streams now: rename the argument, or it is given none"
        )
    network.eval()
    t = torch.full((2,), 0.5, device=module.device)
    returned: list[str] = []
    hook = network.register_forward_hook(lambda _, __, out: returned.append(type(out).__name__))
    try:
        with torch.no_grad():
            evaluate(network, module.recipe.path, x, t, y)
    except TypeError as error:
        raise ValueError(f"{name} must take net(x, t, y=None): {error}") from error
    except AttributeError as error:
        if returned in ([], ["Tensor"]):
            raise
        raise ValueError(
            f"{name} returns a {returned[0]}, and must return a tensor like x"
        ) from error
    except IndexError as error:
        if y is not None and takes_without_labels(network, module.recipe.path, x, t):
            raise ValueError(
                f"{name} knows fewer labels than the {module.num_classes} of {data}: set "
                f"model.network.num_classes={module.num_classes}"
            ) from error
        raise ValueError(
            f"{name} failed as net(x, t, y=None) with x {tuple(x.shape)} and t {tuple(t.shape)}: {error}"
        ) from error
    except RuntimeError as error:
        raise ValueError(
            f"{name} cannot take samples of shape {module.event_shape} from {data}: {error}"
        ) from error
    finally:
        hook.remove()
        network.train(training)


def takes_without_labels(network: nn.Module, path: Path, x: torch.Tensor, t: torch.Tensor) -> bool:
    """Whether it is the labels that a network cannot take."""
    try:
        with torch.no_grad():
            evaluate(network, path, x, t)
    except Exception:
        return False
    return True


def warn_foreign_dropout(network: nn.Module) -> None:
    """Warn of masks that are drawn from the global random state."""
    modules = network.named_modules()
    foreign = [name for name, m in modules if isinstance(m, _DropoutNd) and m.p > 0]
    if foreign:
        warnings.warn(
            f"{foreign[0]} is a torch.nn.Dropout, which draws from the global random state: this run will not "
            "resume bit for bit. fmlightning.nets.embeddings.Dropout is keyed by sample.",
            stacklevel=1,
        )
