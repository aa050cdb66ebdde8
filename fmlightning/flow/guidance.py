r"""Guidance: a field made of two, pushed away from the worse one.

    v_w(x, t | y) = v_0(x, t) + w (v_1(x, t | y) - v_0(x, t))                                          (1)

`w = 1` is the model itself and `w = 0` the other field. Classifier-free guidance (Ho and Salimans 2022) takes
the same network without its label for v_0; autoguidance (Karras et al. 2024) a weaker model with the label.
For a Gaussian path and a Gaussian source (1) is, at each point,

    v_w = (alpha' / alpha) x + (sigma D / alpha) grad log[p_t(x|y)^w p_t(x)^(1-w)],   D = alpha' sigma - alpha sigma'

It is NOT the marginal field of data tilted to q(x|y)^w q(x)^(1-w): the density of tilted data, noised, is not
the noised density, tilted. The distribution of guided samples therefore has no closed form.

Other scales count from 0: Meta's flow_matching writes (1 + w') v_1 - w' v_0, with w' = w - 1.

CFG-Zero* (Fan et al. 2025, arXiv:2503.18886) shortens v_0 first by the factor that brings it closest to v_1,
s = <v_1, v_0> / |v_0|^2 for each sample, and stands still at the very start, where a network is least to be
trusted. Guidance on an interval of times only: Kynkaanniemi et al. 2024 (arXiv:2404.07724).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fmlightning.flow.models import Model, NetworkField
from fmlightning.flow.paths.predictions import affine, to_endpoints
from fmlightning.flow.shapes import Field, Labels, Points, Times, expand_like, flat


@dataclass(frozen=True)
class Guidance:
    """How strongly, when and in which form a field is guided.

    Args:
        scale: w of equation (1); 1 is no guidance.
        t_range: the times between which it acts; elsewhere the model is itself.
        rescale: whether v_0 is rescaled towards v_1, as CFG-Zero* does.
        zero_until: the time up to which the velocity is zero; CFG-Zero* takes 0.04.
    """

    scale: float = 1.0
    t_range: tuple[float, float] = (0.0, 1.0)
    rescale: bool = False
    zero_until: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.t_range
        if not math.isfinite(self.scale):
            raise ValueError(f"guidance.scale={self.scale} must be finite; 1 is no guidance")
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"guidance.t_range={self.t_range} must satisfy 0 <= low < high <= 1; [0, 1] is always"
            )
        if not 0 <= self.zero_until < 1:
            raise ValueError(
                f"guidance.zero_until={self.zero_until} must lie in [0, 1); 0 is never"
            )

    @property
    def is_identity(self) -> bool:
        """Whether the field stays what it is."""
        return self.scale == 1 and self.zero_until == 0

    def cfg(self, field: NetworkField, num_classes: int) -> "NetworkField | GuidedField":
        """Classifier-free guidance of a field whose network takes the label `num_classes` for "no label".

        Args:
            num_classes: 0 where the model has no labels, or has never been trained without them.

        Raises:
            ValueError: the model does not know what "no label" is.
        """
        if self.is_identity:
            return field
        if not num_classes:
            raise ValueError(
                f"guidance.scale={self.scale:g} needs a model with labels, trained with class_dropout_prob > 0; "
                "this one was not: leave it at 1, or guide with a weaker model"
            )
        return GuidedField(self, field, null=num_classes)

    def autoguide(
        self, field: NetworkField, guide_model: NetworkField
    ) -> "NetworkField | GuidedField":
        """Autoguidance by a weaker model of the same path.

        Raises:
            ValueError: the two models were trained on different paths.
        """
        if guide_model.path != field.path:
            raise ValueError(
                f"the weaker model was trained along {guide_model.path} and this one along {field.path}: "
                "autoguidance needs one path"
            )
        return field if self.is_identity else GuidedField(self, field, guide_model=guide_model)


class GuidedField(Model):
    """The field of equation (1), for every solver and metric that takes a trained one.

    Args:
        guidance: scale, interval and form.
        field: the model.
        null: the label that stands for none, for classifier-free guidance: one call of the network answers for
            both, on a batch of twice the size.
        guide_model: the other model, for autoguidance: one call of each.
    """

    offers = frozenset({"velocity"})

    def __init__(
        self,
        guidance: Guidance,
        field: NetworkField,
        *,
        null: int | None = None,
        guide_model: NetworkField | None = None,
    ) -> None:
        super().__init__()
        if (null is None) == (guide_model is None):
            raise ValueError("guidance needs either a null label or a weaker model")
        self.guidance, self.field, self.guide_model, self.null = guidance, field, guide_model, null
        self.path, self.source, self.independent = field.path, field.source, field.independent
        low, high = field.t_range
        if guide_model is not None:
            low, high = max(low, guide_model.t_range[0]), min(high, guide_model.t_range[1])
        self.t_range = (low, high)
        """Where both fields exist."""
        self.source, self.independent = field.source, field.independent

    def velocity(self, x: Points, t: Times, y: Labels | None = None) -> Points:
        """The guided velocity at x (B, *S) and t, (B,) or (), for labels y (B,).

        Raises:
            ValueError: classifier-free guidance without labels.
        """
        v1, v0 = self.both(x, t, y)
        g = self.guidance
        if g.rescale:
            v0 = expand_like(closest(v0, v1), v0) * v0
        v = v0 + expand_like(self.scale(t, v1), v1) * (v1 - v0) if g.scale != 1 else v1
        return torch.where(expand_like(t, v) < g.zero_until, 0, v) if g.zero_until else v

    def both(self, x: Points, t: Times, y: Labels | None) -> tuple[Points, Points]:
        """The velocities of the model and of what it is pushed away from."""
        if self.guide_model is not None:
            return self.field(x, t, y), self.guide_model(x, t, y)
        if y is None:
            raise ValueError(
                "classifier-free guidance needs labels: say which class with y, or leave scale=1"
            )
        labels = torch.cat((y, torch.full_like(y, self.null)))  # type: ignore[arg-type]
        v = self.field(torch.cat((x, x)), t if t.ndim == 0 else torch.cat((t, t)), labels)
        v1, v0 = v.chunk(2)
        return v1, v0

    def scale(self, t: Times, like: Tensor) -> Times:
        """w at the times in the interval, 1 at others."""
        low, high = self.guidance.t_range
        scale = torch.full((), self.guidance.scale, dtype=like.dtype, device=like.device)
        return torch.where((t >= low) & (t <= high), scale, 1)

    def data(self, x: Points, t: Times, y: Labels | None = None) -> Points:
        """The data point that the guided velocity points to."""
        path = affine(self.path, "the end of guided sampling")
        return to_endpoints("velocity", self(x, t, y), x, t, path).x1

    def given(self, y: Labels | None) -> Field:
        """The field for one label of each sample."""
        return lambda x, t: self(x, t, y)


def closest(v0: Points, v1: Points) -> Tensor:
    """s (B,) that brings s v0 closest to v1; 0 where v0 is zero."""
    v0, v1 = flat(v0), flat(v1)
    square = v0.square().sum(1)
    return torch.where(
        square > 0, (v0 * v1).sum(1) / square.clamp_min(torch.finfo(v0.dtype).tiny), 0
    )
