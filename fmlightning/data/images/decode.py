r"""From an image file to bytes of one size.

The central square of an image is shrunk to `size x size`: first halved with a box filter while it is at
least twice too large, then resized with an antialiased cubic. This is the crop of the published ImageNet
figures, so that references computed elsewhere are of the same pixels.

Cameras store how they were held: an image is turned upright first. Transparent pixels have no colour of their own, so
they take that of a background, or are refused.

Source: Dhariwal and Nichol 2021, arXiv:2105.05233, code of guided-diffusion, `center_crop_arr`.
"""

import io
import struct
import zlib
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
"""Formats that are read, whatever a file is called: Pillow would hand others to programs outside."""

DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""Errors that Pillow raises at bytes that are no image."""


Background = Literal["black", "white"]


class BadImage(ValueError):
    """A file that gives no image of the size asked for; the message names it."""


@dataclass(frozen=True)
class Decoder:
    """Decoding of files to bytes (C, size, size).

    Args:
        size: side of the result.
        channels: 3 for colour, 1 for grey.
        crop: side of the central square that is cut out first; None for the largest.
        background: what transparent pixels stand on; None refuses them.
    """

    size: int
    channels: int = 3
    crop: int | None = None
    background: Background | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"data.image_size={self.size} must be at least 1")
        if self.channels not in (1, 3):
            raise ValueError(f"data.channels={self.channels} must be 3 for colour or 1 for grey")
        if self.crop is not None and self.crop < 1:
            raise ValueError(f"data.crop={self.crop} must be at least 1, or null")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size

    def __call__(self, file: str | io.BytesIO, name: str) -> UInt8[Tensor, "C H W"]:
        """The pixels of a file.

        Raises:
            BadImage: it is no image, is damaged or is too small; the message begins with `name`.
        """
        try:
            with Image.open(file, formats=FORMATS) as opened:
                if opened.mode[0] in "IF":
                    raise ValueError("more than 8 bits a channel; convert it to 8")
                upright = self.opaque(ImageOps.exif_transpose(opened))
                square = self.square(upright.convert("RGB" if self.channels == 3 else "L"))
        except DAMAGED as error:
            raise BadImage(f"{name}: no readable image ({describe(error)})") from error
        pixels = torch.from_numpy(np.array(centre_crop(square, self.size)))
        return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()

    def opaque(self, image: Image.Image) -> Image.Image:
        """The image on the background, where it has transparent pixels."""
        if not image.has_transparency_data:
            return image
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] == 255:
            return image
        if self.background is None:
            raise ValueError(
                "it has transparent pixels; data.background=white or black puts them on that colour"
            )
        return Image.alpha_composite(Image.new("RGBA", image.size, self.background), image)

    def square(self, image: Image.Image) -> Image.Image:
        """The image, or its central square of `crop` pixels."""
        if self.crop is None:
            return image
        if min(image.size) < self.crop:
            raise ValueError(f"{image.width} x {image.height} is smaller than crop={self.crop}")
        return cut(image, self.crop)


def describe(error: Exception) -> str:
    """The cause in one line, without the address of the buffer that Pillow names."""
    known = isinstance(error, OSError) and "cannot identify" in str(error)
    return "of no known format" if known else " ".join(str(error).split()) or type(error).__name__


def file_size(file: str) -> tuple[int, int] | None:
    """Width and height from the header alone; None if it is no image."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            return image.size
    except DAMAGED:
        return None


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square, shrunk (or, of a smaller image, enlarged) to `size`."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    sides = (round(image.width * scale), round(image.height * scale))
    return cut(image.resize(sides, Image.Resampling.BICUBIC), size)


def cut(image: Image.Image, size: int) -> Image.Image:
    """The central square of `size` pixels."""
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
