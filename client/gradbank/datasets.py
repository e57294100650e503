"""The glyph retrieval set: 2069 characters in 12 typefaces, drawn from fonts that come with matplotlib.

It has the shape that metric learning cares about (many classes, few images of each, test classes that
training never sees), needs no download, and is drawn in a few seconds.
"""

import os
import unicodedata
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkstemp
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Glyphs", "augment", "glyphs"]

SIDE = 28
POINT_SIZE = 22
FACES = 12
# The version grows whenever the drawing changes, so that an older cache is not read as the new set.
CACHE_NAME = "glyphs-1.npz"


@dataclass(frozen=True, eq=False)
class Glyphs:
    """Images of characters, each character once in each of 12 typefaces.

    images: (N, 28, 28) uint8, white on black. labels: (N,) int64, indices into `characters`.
    The images of a class are neighbours: class `c` is `images[12 * c : 12 * (c + 1)]`.
    """

    images: Tensor
    labels: Tensor
    characters: str

    def __len__(self) -> int:
        return len(self.labels)

    def split(self, seed: int = 0) -> tuple["Glyphs", "Glyphs"]:
        """Two halves without a class in common: one to train on, one of unseen classes to test on."""
        order = torch.randperm(len(self.characters), generator=torch.Generator().manual_seed(seed))
        half = len(order) // 2
        return self.select(order[:half]), self.select(order[half:])

    def select(self, classes: Tensor) -> "Glyphs":
        """Only these classes, (C,) int64, numbered anew from 0 in the given order."""
        rows = (classes[:, None] * FACES + torch.arange(FACES)).flatten()
        labels = torch.arange(len(classes)).repeat_interleave(FACES)
        return Glyphs(self.images[rows], labels, "".join(self.characters[c] for c in classes.tolist()))


def glyphs(cache: Path | None = None) -> Glyphs:
    """The whole set: 24,828 images of 2069 classes.

    The first call draws it (some seconds; needs the extra `demo`) and keeps it in the folder `cache`, by
    default `gradbank` in `$XDG_CACHE_HOME` or `~/.cache`. Later calls read that file, and draw again if it
    is damaged.
    """
    file = (cache or _cache_folder()) / CACHE_NAME
    try:
        images, codepoints = _read(file)
    except (OSError, EOFError, KeyError, ValueError, BadZipFile, zlib.error):
        images, codepoints = _draw()
        try:
            _write(file, images, codepoints)
        except OSError as error:  # a read-only home costs a few seconds each time, not the data
            warnings.warn(f"the glyphs were drawn but not cached: {error}", stacklevel=2)
    labels = torch.arange(len(codepoints)).repeat_interleave(FACES)
    return Glyphs(torch.from_numpy(images).flatten(0, 1), labels, "".join(map(chr, codepoints.tolist())))


def augment(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Turns, scales and shifts each image at random: (B, 28, 28) uint8 -> (B, 1, 28, 28) float in [0, 1].

    Up to 0.3 radians (17 degrees) either way, 0.8 to 1.25 times the size, a tenth of the side in x and y.
    """
    turn, zoom, right, down = torch.rand(4, len(images), generator=generator)
    angle = (2 * turn - 1) * 0.3
    # The grid says where each output pixel looks in the input, so a large scale makes a small glyph.
    scale = 0.8 + 0.45 * zoom
    cos, sin = scale * angle.cos(), scale * angle.sin()
    shift_x, shift_y = (2 * right - 1) * 0.2, (2 * down - 1) * 0.2  # the side is 2 long in grid units
    affine = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], dim=1).view(-1, 2, 3)
    pixels = images[:, None].float() / 255
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, align_corners=False).clamp_(0, 1)


def _cache_folder() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says to ignore a relative path.
    return (base if base.is_absolute() else Path.home() / ".cache") / "gradbank"


def _read(file: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    # Opened here: of a damaged file numpy leaves its own handle open.
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        images, codepoints = arrays["images"], arrays["codepoints"]
    if images.dtype != np.uint8 or images.shape != (len(codepoints), FACES, SIDE, SIDE):
        raise ValueError(f"{file} holds images of shape {images.shape} and type {images.dtype}")
    return images, codepoints


def _write(file: Path, images: npt.NDArray[np.uint8], codepoints: npt.NDArray[np.int32]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Two processes may draw at once: each writes a file of its own, and a reader never sees a part of one.
    handle, part = mkstemp(dir=file.parent, prefix=file.stem, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            np.savez_compressed(stream, images=images, codepoints=codepoints)
        os.replace(part, file)
    finally:
        Path(part).unlink(missing_ok=True)  # there is none if all went well


def _draw() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """Images (classes, 12, 28, 28) and code points (classes,) of the letters, numbers and symbols."""
    try:
        from fontTools.ttLib import TTFont
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise _missing(error.name or "pillow") from error

    faces = _faces()

    def covered(face: Path) -> set[int]:
        with TTFont(face, lazy=True) as font:
            return set(font.getBestCmap())

    def draw(font: ImageFont.FreeTypeFont, text: str) -> npt.NDArray[np.uint8]:
        image = Image.new("L", (SIDE, SIDE))
        canvas = ImageDraw.Draw(image)
        left, top, right, bottom = canvas.textbbox((0, 0), text, font=font)
        canvas.text(((SIDE - right - left) / 2, (SIDE - bottom - top) / 2), text, fill=255, font=font)
        return np.asarray(image)

    common = set.intersection(*map(covered, faces))
    codepoints = [c for c in sorted(common) if unicodedata.category(chr(c))[0] in "LNS"]
    # Pillow's other layout engine depends on a library that may be missing, and may place a glyph elsewhere.
    fonts = [ImageFont.truetype(face, POINT_SIZE, layout_engine=ImageFont.Layout.BASIC) for face in faces]
    # Latin A, Greek Alpha and Cyrillic A look the same: characters alike in the first face are one class.
    first = {draw(fonts[0], chr(c)).tobytes(): c for c in reversed(codepoints)}
    classes = sorted(first.values())
    images = np.stack([[draw(font, chr(c)) for font in fonts] for c in classes])
    return images, np.array(classes, dtype=np.int32)


def _faces() -> Sequence[Path]:
    # find_spec locates matplotlib without importing it, which would take longer than drawing a face.
    spec = find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise _missing("matplotlib")
    folder = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"
    faces = sorted(file for file in folder.glob("DejaVu*.ttf") if "Display" not in file.name)
    if len(faces) != FACES:
        raise FileNotFoundError(f"expected {FACES} DejaVu faces in {folder}, found {len(faces)}")
    return faces


def _missing(module: str) -> ImportError:
    return ImportError(f'drawing the glyphs needs {module}: pip install "gradbank[demo]"', name=module)
