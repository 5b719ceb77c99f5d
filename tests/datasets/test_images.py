"""Single pictures: what is found in a folder, 8-bit RGB of whatever a file holds, and what is said of the others."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toys import noise

from sptseg.datasets.images import Note, Unreadable, as_array, images_by_name, open_image, reduce


def pixel(path: Path) -> tuple[int, ...]:
    return tuple(np.asarray(open_image(path))[0, 0].tolist())


@pytest.mark.parametrize("suffix", "JPG jfif jpe gif avif webp bmp tif tiff PNG ppm tga jp2 ico qoi".split())
def test_all_that_pillow_reads_is_found_in_a_folder(tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (16, 16), (200, 100, 50)).save(tmp_path / f"a.{suffix}")
    for name in (".b.png", "._a.png", ".DS_Store"):
        (tmp_path / name).write_bytes(b"hidden")
    assert images_by_name(tmp_path) == {"a": tmp_path / f"a.{suffix}"}
    assert np.allclose(pixel(tmp_path / f"a.{suffix}"), (200, 100, 50), atol=8)


def test_what_is_left_out_of_a_folder_is_listed(tmp_path: Path) -> None:
    for name in ("a.heic", "b.txt", "c.pdf", "d.mpg", "e.eps", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"?")
    (tmp_path / "f.png").mkdir()
    left = "7 entries that are no pictures Pillow reads: Thumbs.db, a.heic, b.txt, c.pdf, d.mpg, e.eps, f.png"
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no pictures, but {left}; wanted"):
        images_by_name(tmp_path)
    Image.new("L", (2, 2)).save(tmp_path / "z.png")
    with pytest.warns(Note, match=f"{tmp_path}: left out {left}"):
        assert list(images_by_name(tmp_path)) == ["z"]
    Image.new("L", (2, 2)).save(tmp_path / "z.GIF")
    with pytest.raises(ValueError, match=r"z.GIF and .*z.png are of one name; rename one"):
        images_by_name(tmp_path)


@pytest.mark.parametrize("form", ["gif", "png", "tif"])
def test_the_first_of_several_frames_is_taken_and_that_is_said(tmp_path: Path, form: str) -> None:
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 0, 250)))
    first.save(tmp_path / f"a.{form}", save_all=True, append_images=[second])
    with pytest.warns(Note, match=rf"a.{form}: of several frames or pages the first is taken"):
        assert np.allclose(pixel(tmp_path / f"a.{form}"), (250, 0, 0), atol=6)


def png_16(values: np.ndarray, significant: int | None = None) -> bytes:
    """A PNG of 16 bits a sample: grey (H,W), colour (H,W,3) or with alpha (H,W,4); an sBIT chunk if asked for."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    channels = 1 if values.ndim == 2 else values.shape[2]
    header = struct.pack(">IIBBBBB", values.shape[1], len(values), 16, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    sbit = chunk(b"sBIT", bytes([significant] * channels)) if significant else b""
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in values.astype(">u2")))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + sbit + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("bits", "channels"), [(8, 1), (12, 1), (16, 1), (10, 3), (14, 3), (16, 3), (12, 4)])
def test_deep_samples_are_scaled_by_the_bits_they_use(tmp_path: Path, bits: int, channels: int) -> None:
    values = np.random.default_rng(bits).integers(0, 2**bits, (6, 5, channels))
    values[0, 0, 0] = 2**bits - 1
    values[..., 3:] = 65535
    wanted = np.broadcast_to(values[..., :3] * 255 / (2**bits - 1), (6, 5, 3))
    path = tmp_path / "deep.png"
    for content, said in ((png_16(values.squeeze()), bits < 16), (png_16(values.squeeze(), bits), False)):
        path.write_bytes(content)
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            assert np.abs(as_array(path) - wanted).max() <= 1
        text = f"{path}: no more than {bits} of its 16 bits are used: scaled as {bits}-bit values"
        assert [str(note.message) for note in notes] == [text] * said
    path.write_bytes(png_16(values.squeeze() << (16 - bits), bits))
    assert np.abs(as_array(path) - wanted).max() <= 1, "the standard's way: significant bits are the highest"


def test_dark_pictures_whose_files_say_how_deep_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 4095\n" + np.array([819, 0], ">u2").tobytes())
    (tmp_path / "b.png").write_bytes(png_16(np.array([[819, 1]]), 12))
    Image.fromarray(np.array([[819, 0]], np.uint16)).save(tmp_path / "c.tif", tiffinfo={281: 4095})
    Image.fromarray(np.array([[13107, 0]], np.uint16)).save(tmp_path / "d.jp2", irreversible=False)
    assert [pixel(path) for path in sorted(tmp_path.iterdir())] == [(51, 51, 51)] * 4  # a fifth of the range


def test_transparency_is_laid_over_white_and_other_modes_become_rgb(tmp_path: Path) -> None:
    path, palette = tmp_path / "image.png", Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    for image, options, wanted in (
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), {}, (255, 255, 255)),
        (Image.new("LA", (2, 2), (0, 255)), {}, (0, 0, 0)),
        (Image.new("RGB", (2, 2), (9, 9, 9)), {"transparency": (9, 9, 9)}, (255, 255, 255)),
        (palette, {"transparency": 0}, (200, 100, 50)),
    ):  # fmt: skip
        image.save(path, **options)
        assert pixel(path) == wanted
        assert not options or as_array(Image.open(path))[0, 0].tolist() == list(wanted)
    with pytest.raises(ValueError, match=r"uint16 of shape \(2, 2\); wanted uint8"):
        as_array(Image.fromarray(np.full((2, 2), 999, np.uint16)))
    modes = {"CMYK": ((0, 255, 255, 0), (255, 0, 0)), "1": (1, (255, 255, 255)), "L": (7, (7, 7, 7))}
    for mode, (value, wanted) in modes.items():
        Image.new(mode, (8, 8), value).save(tmp_path / "a.tif")
        assert pixel(tmp_path / "a.tif") == wanted


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_orientation_is_applied_and_damaged_exif_data_are_passed_over(tmp_path: Path, suffix: str) -> None:
    path, exif = tmp_path / f"turned.{suffix}", Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (32, 16))
    image.paste((255, 255, 255), (0, 0, 16, 16))  # white at the left: at the top after the quarter turn
    image.save(path, exif=exif)
    upright = np.asarray(open_image(path))
    assert upright.shape == (32, 16, 3)
    assert upright[2, 8].min() > 200 and upright[-2, 8].max() < 50
    Image.new("RGB", (8, 4)).save(path, exif=b"Exif\x00\x00no TIFF header")  # Pillow raises for PNG
    assert open_image(path).size == (8, 4)


def test_images_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise().save(png := io.BytesIO(), "PNG")
    sound = png.getvalue()

    def promising(width: int, height: int) -> bytes:
        header = sound[12:16] + struct.pack(">II", width, height) + sound[24:29]
        return sound[:12] + header + struct.pack(">I", zlib.crc32(header)) + sound[33:]

    contents = {
        "text.jpg": b"hello", "zeros.png": bytes(5000), "sum.png": sound[:29] + bytes(4) + sound[33:],
        "more.png": promising(100, 100), "row.png": promising(2**28, 1), "empty.png": promising(0, 10),
        "drawing.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Unreadable, match=name):
            open_image(tmp_path / name)
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((2, 2), 70000, np.int32)).save(tmp_path / "wide.tif")
    for suffix in ("jpg", "png", "webp", "tif"):
        whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
        noise(size=(64, 64)).save(whole)
        cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        with pytest.raises(Unreadable, match=f"cut.{suffix} is (damaged or cut off|not an image)"):
            open_image(cut)
    for name, error, message in (
        ("none.jpg", FileNotFoundError, "none.jpg does not exist; wanted an image file"),
        (".", FileNotFoundError, "is a folder"),
        ("text.jpg", Unreadable, r"text.jpg is not an image that Pillow can read \(5 bytes\)"),
        ("float.tif", Unreadable, "float.tif holds floating-point values"),
        ("wide.tif", Unreadable, "grey values from 70000 to 70000; wanted 8 or 16 bits"),
    ):
        with pytest.raises(error, match=message):
            open_image(tmp_path / name)
    for limit in (1000, 3000):  # of 4096 pixels: Pillow's error, Pillow's warning
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(Unreadable, match=f"whole.png has more .* limit of {limit}; .*--max-pixels"):
            open_image(tmp_path / "whole.png")
        with pytest.raises(Unreadable, match="limit of 4095"):
            open_image(tmp_path / "whole.png", 4095)
        assert open_image(tmp_path / "whole.png", 4096).size == (64, 64) and limit == Image.MAX_IMAGE_PIXELS


def test_reduced_pictures_and_labels_stay_on_each_other() -> None:
    labels = np.zeros((300, 500), np.int64)
    labels[:150, 250:] = 7
    image = np.repeat((labels * 30).astype(np.uint8)[..., None], 3, 2)
    small, few = reduce(image, 100), reduce(labels, 100)
    assert small.shape == (60, 100, 3) and few.shape == (60, 100) and few.dtype == np.int64
    assert (few[:30, 50:] == 7).all() and few.sum() == 7 * 30 * 50
    assert np.abs(small[..., 0].astype(int) - few * 30).mean() < 3
    assert reduce(image, 500) is image
