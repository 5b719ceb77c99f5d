"""Single pictures: found in folders, read from files, as arrays, to PNG bytes."""

import contextlib
import re
import struct
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_image

from sptseg.datasets.splits import composed
from sptseg.system import bytes_of

Array = np.ndarray
StrPath = str | PathLike[str]
NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow only recognises them, or starts another program


class Unreadable(OSError, ValueError):
    """A file that is no picture, is damaged, dangerously large, or of values whose meaning nobody can tell."""


class Note(UserWarning):
    """Something guessed, dropped or rescaled: `Note(path, text)`."""

    def __str__(self) -> str:
        return "{}: {}".format(*self.args)


def images_by_name(folder: Path) -> dict[str, Path]:
    """The pictures in a folder, sorted, by name without suffix: all that Pillow reads, but no hidden files. What is
    left out is said (`Note`). Raises ValueError for two of one name, FileNotFoundError if there is none."""
    Image.init()
    read = {suffix for suffix, kind in Image.registered_extensions().items() if kind in {*Image.OPEN} - NOT_READ}
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    pictures = [path for path in paths if path.suffix.lower() in read and path.is_file()]
    left_out = [path.name for path in sorted({*paths} - {*pictures})]
    left = f"{len(left_out)} entries that are no pictures Pillow reads: {listed(left_out)}" if left_out else ""
    if not pictures:
        raise FileNotFoundError(f"{folder} holds no pictures{left and ', but '}{left}; wanted .jpg, .png or the like")
    found = by_name((path.stem, path) for path in pictures)
    if left:
        warnings.warn(Note(folder, f"left out {left}"), stacklevel=2)
    return found


def by_name(named: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Paths by name, whatever its Unicode form; two of one name are refused."""
    found: dict[str, Path] = {}
    for name, path in named:
        if found.setdefault(composed(name), path) != path:
            raise ValueError(f"{found[composed(name)]} and {path} are of one name; rename one, or take it away")
    return found


def sorted_images(folder: Path) -> list[Path]:
    """The pictures in a folder, as of `images_by_name`."""
    return list(images_by_name(folder).values())


def listed(names: Sequence[str], most: int = 12) -> str:
    """Names with commas, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def open_image(path: StrPath, max_pixels: int | None = None) -> Image.Image:
    """A picture's file as upright 8-bit RGB: EXIF orientation applied, transparency over white, 16 bits scaled to 8.

    Of several frames the first is taken, and of 16 bits those that the file names or its highest value needs; a `Note`
    says so. Pictures of more than `max_pixels` (None: PIL.Image.MAX_IMAGE_PIXELS) are refused.
    Raises FileNotFoundError, or Unreadable for what is no picture, is damaged or is dangerously large."""
    return _rgb(_load(path, max_pixels, eight_bits=True))


def _rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def open_mask(path: StrPath, max_pixels: int | None = None) -> Array:
    """The values (H,W) of a mask's file, int64, upright; of a palette the positions. Raises as `open_image`."""
    if Path(path).suffix.lower() == ".mat":
        return _matlab(Path(path))
    mask = _load(path, max_pixels)
    if mask.mode not in ("1", "L", "P", "I", "I;16"):
        wanted = "one class index per pixel (8-bit grey or palette PNG): save the indices instead of the colours"
        raise Unreadable(f"{path} is a mask of mode {mask.mode}; wanted {wanted}")
    return np.asarray(mask).astype(np.int64)


def open_ade20k_mask(path: StrPath, max_pixels: int | None = None) -> Array:
    """The class numbers (H,W) in one of ADE20K's *_seg.png, int64: red // 10 * 256 + green; 0 has no class."""
    mask = _load(path, max_pixels)
    if mask.mode != "RGB":
        raise Unreadable(f"{path} is a mask of mode {mask.mode}; wanted the RGB of ADE20K's *_seg.png: get it again")
    red, green, _ = np.moveaxis(np.asarray(mask).astype(np.int64), 2, 0)
    return red // 10 * 256 + green


def _matlab(path: Path) -> Array:
    """int64 (H,W) of a MATLAB file: PASCAL Context's LabelMap, SBD's GTcls.Segmentation."""
    from scipy.io import loadmat  # 0.1 s that few need

    try:
        content = loadmat(path, variable_names=("LabelMap", "GTcls"))
        values = content["LabelMap"] if "LabelMap" in content else content["GTcls"]["Segmentation"][0, 0]
        return values.astype(np.int64)
    except Exception as error:  # scipy raises whatever its parser stumbles over
        raise Unreadable(f"{path} is damaged, or no mask of Context or SBD ({error!r}); get it again") from error


def _load(path: StrPath, max_pixels: int | None, eight_bits: bool = False) -> Image.Image:
    """The file's first picture, upright, in its own mode."""
    path, limit, notes = Path(path), Image.MAX_IMAGE_PIXELS, []
    if not path.is_file():
        if re.match(r"\w{2,}:/", str(path)):
            raise FileNotFoundError(f"{path} is a web address; sptseg reads files only: download it")
        got = "does not exist" if not path.exists() else "is a folder" if path.is_dir() else "is a pipe or a device"
        raise FileNotFoundError(f"{path} {got}; wanted an image file: check the path")
    try:
        Image.MAX_IMAGE_PIXELS = limit if max_pixels is None else max_pixels
        with warnings.catch_warnings(action="ignore"):  # of odd metadata: the pixels count
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                if getattr(opened, "is_animated", False) and opened.format not in ("MPO", "PSD"):  # previews, layers
                    notes = ["of several frames or pages the first is taken"]
                deep = opened.mode[0] in "IF" or re.search(";16[BLN]", str(opened.tile))
                opened.load()
                with contextlib.suppress(SyntaxError, ValueError, struct.error):  # damaged EXIF data say nothing
                    ImageOps.exif_transpose(opened, in_place=True)
                image: Image.Image = opened
                if eight_bits and deep:
                    image = _scaled(image, path, notes)
    except (Unreadable, PermissionError):
        raise
    except UnidentifiedImageError as error:
        told = f"{path} is not an image that Pillow can read ({path.stat().st_size} bytes)"
        raise Unreadable(f"{told}; wanted JPEG, PNG or the like: convert it, or take it out of the folder") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        told = f"{path} has more pixels than the safe limit of {Image.MAX_IMAGE_PIXELS}; shrink it, or if you trust the"
        raise Unreadable(f"{told} file, raise it: --max-pixels (in Python PIL.Image.MAX_IMAGE_PIXELS)") from error
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise Unreadable(f"{path} is damaged or cut off ({error}); wanted a whole image: copy it again") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    for note in notes:
        warnings.warn(Note(path, note), stacklevel=3)
    return image


def _scaled(image: Image.Image, path: Path, notes: list[str]) -> Image.Image:
    """A picture of 16 bits a sample with 8: its brightest possible value becomes 255."""
    if image.mode == "F":
        raise Unreadable(f"{path} holds floating-point values of unknown range; save it as an 8- or 16-bit image")
    values = np.asarray(image)  # (H,W), or of colours, of which Pillow keeps the high bytes only, (H,W,3 or 4)
    if values.ndim == 3:
        if values[..., :3].max() >= 64:  # more than 14 bits are used
            return image
        if image.format != "PNG":
            notes.append("of its 16 bits a channel only the highest 8 are read, and few used: save it as PNG")
            return image
        values = decode_image(str(path), ImageReadMode.UNCHANGED, apply_exif_orientation=True).permute(1, 2, 0).numpy()
    colours = values[..., :3] if values.ndim == 3 else values
    lowest, highest = int(colours.min()), int(colours.max())
    if lowest < 0 or highest > 65535:
        raise Unreadable(f"{path} has grey values from {lowest} to {highest}; wanted 8 or 16 bits: save it with 8")
    bits = next(n for n in (8, 10, 12, 14, 16) if highest < 2**n)
    named = image.format == "PNG" and re.search(rb"sBIT([\x01-\x10])", path.read_bytes().partition(b"IDAT")[0])
    if named:  # the standard wants the significant bits to be the highest ones; many writers use the lowest
        low_ones = highest < 2 ** named[1][0] and (colours % 2 ** (16 - named[1][0])).any()
        bits = named[1][0] if low_ones else 16
    elif image.format == "TIFF" and (told := image.getexif().get(281)):  # MaxSampleValue
        bits = max(told, highest).bit_length()
    elif image.format in ("PPM", "JPEG2000"):  # Pillow has scaled them to 16
        bits = 16
    elif bits < 16 and highest:
        notes.append(f"no more than {bits} of its 16 bits are used: scaled as {bits}-bit values")
    full = 2**bits - 1
    return Image.fromarray(((values.astype(np.uint32) * 255 + full // 2) // full).clip(max=255).astype(np.uint8))


def luminance(image: Array) -> Array:
    """Brightness (H, W), 0..1, of a picture (H, W, 3) uint8; a grey one (H, W) uint8 is only scaled."""
    return (image if image.ndim == 2 else image @ np.array([0.299, 0.587, 0.114])) / 255


def png(array: Array) -> bytes:
    """A grey (H,W) or colour (H,W,3) picture, uint8, as a PNG file."""
    return bytes_of(partial(Image.fromarray(array).save, format="png", compress_level=1))


def enlarge(array: Array, factor: int) -> Array:
    """An image (H,W,3) smoothly, or labels (H,W) exactly, `factor` times as large."""
    if array.ndim == 2:
        return array.repeat(factor, axis=0).repeat(factor, axis=1)
    size = array.shape[1] * factor, array.shape[0] * factor
    return np.asarray(Image.fromarray(array).resize(size, Image.Resampling.BICUBIC))


def reduce(array: Array, longest: int) -> Array:
    """An image (H,W,3) smoothly, or labels (H,W) by nearest ones, with a long side of at most `longest` pixels."""
    ratio = longest / max(array.shape[:2])
    if ratio >= 1:
        return array
    height, width = (max(1, round(side * ratio)) for side in array.shape[:2])
    if array.ndim == 3:
        return np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.BILINEAR))
    rows, columns = ((np.arange(n) + 0.5) * side / n for n, side in zip((height, width), array.shape, strict=True))
    return array[np.ix_(rows.astype(int), columns.astype(int))]


def as_array(image: Array | Image.Image | StrPath, max_pixels: int | None = None) -> Array:
    """A picture as (H, W, 3) uint8, from an array, a PIL image, or a file as of `open_image`."""
    if isinstance(image, str | PathLike):
        return np.asarray(open_image(image, max_pixels))
    if isinstance(image, Image.Image) and image.mode[0] not in "IF":
        image = _rgb(image)
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or 0 in array.shape:
        raise ValueError(f"the image is {array.dtype} of shape {array.shape}; wanted uint8 of shape (height, width, 3)")
    return np.ascontiguousarray(array)  # torch takes no negative strides, as mirrored and BGR views have
