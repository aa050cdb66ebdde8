r"""A network made elsewhere, in two lines.

    from diffusers import UNet2DModel
    network = Adapter(UNet2DModel(sample_size=32, num_class_embeds=11), num_classes=10)

and in a config

    network:
      class_path: Adapter
      init_args:
        network: {class_path: diffusers.UNet2DModel, init_args: {sample_size: 32, num_class_embeds: 11}}
        num_classes: 10

A network of one's own needs none where its `forward` is `(self, x, t, y=None)`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fmlightning.flow.shapes import Labels, PerSample, Points


class Adapter(nn.Module):
    """A velocity network made of one that takes a time in other units, labels by name, or returns a record.

    `network(x, time_scale * t, **{labels: y})` is called, and of what it returns a tensor is kept: itself, its
    `sample`, or the first of a tuple. The defaults are those of diffusers. TorchCFM's and guided-diffusion's take
    `time_first=True, labels="y"`, the former with `time_scale=1`.

    Args:
        network: a network that returns a tensor of x's shape.
        time_scale: what time 1 is to it. Data is there: weights trained with noise at the last step do not fit.
        num_classes: number of labels; it must know one more, `num_classes`, which stands for "no label".
            0 passes none.
        labels: the name of its argument for labels.
        time_first: whether it takes (t, x) rather than (x, t).
    """

    def __init__(
        self,
        network: nn.Module,
        time_scale: float = 1000.0,
        num_classes: int = 0,
        labels: str = "class_labels",
        time_first: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes} must be positive, or 0 for no labels")
        self.network, self.num_classes = network, num_classes
        self.time_scale, self.labels, self.time_first = time_scale, labels, time_first

    def forward(self, x: Points, t: PerSample, y: Labels | None = None) -> Points:
        """The prediction at x (B, *S); labels None for the whole batch stand for "no label"."""
        time = self.time_scale * t
        given: dict[str, Tensor] = {}
        if self.num_classes:
            null = torch.full((len(x),), self.num_classes, device=x.device)
            given = {self.labels: null if y is None else y}
        return tensor(self.network(*((time, x) if self.time_first else (x, time)), **given))


def tensor(out: Any) -> Tensor:
    """The prediction in what a network returns."""
    if isinstance(out, Tensor):
        return out
    found = getattr(out, "sample", None)
    found = out[0] if found is None and isinstance(out, tuple) else found
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the adapted network returns a {type(out).__name__}: it must be a tensor, a tuple that starts with one, "
            "or have one as its attribute `sample`"
        )
    return found
