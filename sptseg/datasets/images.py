"""Single pictures: read from files, as arrays, to PNG bytes."""

from __future__ import annotations

import io
import re
import struct
import warnings
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Array = np.ndarray
StrPath = str | PathLike[str]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


class Unreadable(OSError, ValueError):
    """A file that is no image, is damaged or is dangerously large."""


def open_image(path: StrPath) -> Image.Image:
    """An image file as upright 8-bit RGB: EXIF orientation applied, transparency over white, 16 bits scaled to 8.

    Raises FileNotFoundError, or Unreadable for what is no image, is damaged or is dangerously large.
    """
    image = _load(path)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"{path} has grey values from {values.min()} to {values.max()}; wanted 8 or 16 bits: "
                "rescale it and save it as an 8-bit image"
            )
        return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")  # 65535 -> 255
    if image.mode == "F":
        raise ValueError(f"{path} holds floating-point values of unknown range; save it as an 8- or 16-bit image")
    return image.convert("RGB")


def _load(path: StrPath) -> Image.Image:
    """The file's decoded image, upright, in its own mode."""
    path = Path(path)
    if not path.is_file():
        if re.match(r"\w{2,}:/", str(path)):
            raise FileNotFoundError(
                f"{path} is a web address; sptseg reads files only: download it, give the file's path"
            )
        got = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {got}; wanted an image file: check the path")
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd metadata: the pixels count
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                opened.load()
                return _upright(opened)
    except UnidentifiedImageError as error:
        raise Unreadable(
            f"{path} is not an image that Pillow can read ({path.stat().st_size} bytes); wanted JPEG, PNG or the like: "
            "convert it, or take it out of the folder"
        ) from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise Unreadable(
            f"{path} has more pixels than the safe limit of {Image.MAX_IMAGE_PIXELS}; shrink it, "
            "or raise PIL.Image.MAX_IMAGE_PIXELS if you trust the file"
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise Unreadable(f"{path} is damaged or cut off ({error}); wanted a whole image: copy it again") from error


def _indices(path: Path) -> np.ndarray:
    """int64 (H,W) of a grey or palette image."""
    mask = _load(path)
    if mask.mode not in ("1", "L", "P", "I", "I;16"):
        raise ValueError(
            f"{path} is a mask of mode {mask.mode}; wanted one class index per pixel (8-bit grey or palette PNG): "
            "save the indices instead of the colours"
        )
    return np.asarray(mask).astype(np.int64)


def _matlab(path: Path) -> np.ndarray:
    """int64 (H,W) of a MATLAB file: PASCAL Context's LabelMap, SBD's GTcls.Segmentation."""
    from scipy.io import loadmat  # 0.1 s that few need

    try:
        content = loadmat(path, variable_names=("LabelMap", "GTcls"))
        values = content["LabelMap"] if "LabelMap" in content else content["GTcls"]["Segmentation"][0, 0]
        return values.astype(np.int64)
    except Exception as error:  # scipy raises whatever its parser stumbles over
        raise Unreadable(f"{path} is damaged, or no mask of Context or SBD ({error!r}); get it again") from error


def _upright(image: Image.Image) -> Image.Image:
    """A copy, turned as its EXIF orientation says; damaged EXIF data say nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, struct.error):
        return image.copy()


def sorted_images(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise FileNotFoundError(f"{folder} holds no pictures; wanted files ending in {', '.join(IMAGE_SUFFIXES)}")
    return files


def luminance(image: Array) -> Array:
    """Brightness (H, W), 0..1, of a picture (H, W, 3) uint8; a grey one (H, W) uint8 is only scaled."""
    return (image if image.ndim == 2 else image @ np.array([0.299, 0.587, 0.114])) / 255


def png(array: Array) -> bytes:
    """A grey (H,W) or colour (H,W,3) picture, uint8, as a PNG file."""
    if array.dtype != np.uint8 or (array.ndim != 2 and array.shape[2:] != (3,)):
        raise ValueError(f"png: got {array.dtype} {array.shape}; wanted uint8 (H,W) or (H,W,3)")
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="png", compress_level=1)
    return buffer.getvalue()


def enlarge(array: Array, factor: int) -> Array:
    """An image (H,W,3) smoothly, or labels (H,W) exactly, `factor` times as large."""
    if array.ndim == 2:
        return array.repeat(factor, axis=0).repeat(factor, axis=1)
    image = Image.fromarray(array)
    return np.asarray(image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC))


def as_array(image: np.ndarray | Image.Image | str | PathLike[str]) -> np.ndarray:
    """A picture as (H, W, 3) uint8, from an array, a PIL image or a file."""
    if isinstance(image, str | PathLike):
        return np.asarray(open_image(Path(image)))
    array = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or 0 in array.shape:
        raise ValueError(f"the image is {array.dtype} of shape {array.shape}; wanted uint8 of shape (height, width, 3)")
    return np.ascontiguousarray(array)  # torch takes no negative strides, as mirrored and BGR views have
