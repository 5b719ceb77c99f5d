"""Miniature data sets in the real layouts, label by label; and what is said about faulty ones."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from sptseg import scenes
from sptseg.datasets import folders as datasets
from sptseg.datasets import splits, transforms
from sptseg.datasets.folders import ImageMaskFolder, folder_split
from sptseg.datasets.images import open_image
from sptseg.datasets.splits import IGNORE, Split

REPOSITORY = Path(__file__).resolve().parents[2]
CAMVID = Path(os.environ.get("SPTSEG_CAMVID", REPOSITORY / "../shared/camvid"))

ABC = Split.from_names("abc", ["a", "b", "c"])


def save_image(path: Path, size: tuple[int, int] = (4, 3), colour: tuple[int, int, int] = (10, 20, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def save_mask(path: Path, values: list[list[int]], palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.fromarray(np.array(values, dtype=np.uint8))
    if palette:
        mask.putpalette([channel for k in range(256) for channel in (k, 255 - k, k // 2)])  # makes it mode P
    mask.save(path)


def save_list(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def label(dataset: ImageMaskFolder, index: int = 0) -> list[list[int]]:
    return dataset[index]["label"].tolist()


MASK = [[0, 1, 2, 255], [0, 0, 1, 1], [2, 2, 2, 2]]  # fits save_image's 4 x 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A healthy folder of two images."""
    for name in ("one", "two"):
        save_image(tmp_path / f"images/{name}.png")
        save_mask(tmp_path / f"masks/{name}.png", MASK)
    return tmp_path


# ---------------------------------------------------------------- folders


def test_folder_items(folder: Path) -> None:
    dataset = ImageMaskFolder(folder, ABC)
    assert (len(dataset), dataset.split, dataset.names) == (2, ABC, ("one", "two"))
    item = dataset[0]
    assert isinstance(item["image"], tv_tensors.Image) and isinstance(item["label"], tv_tensors.Mask)
    assert (item["image"].shape, item["image"].dtype) == ((3, 3, 4), torch.uint8)
    assert (item["label"].shape, item["label"].dtype) == ((3, 4), torch.int64)
    assert item["image"][:, 0, 0].tolist() == [10, 20, 30]
    assert item["label"].tolist() == MASK
    assert item["name"] == "one"


def test_folder_is_sorted_and_suffixes_may_be_capitals(tmp_path: Path) -> None:
    for image, mask in (("b.JPG", "b.PNG"), ("a.Jpeg", "a.png"), ("c.png", "c.png")):
        save_image(tmp_path / "images" / image)
        save_mask(tmp_path / "masks" / mask, MASK)
    (tmp_path / "images/notes.txt").write_text("not an image")
    (tmp_path / "images/._a.jpg").write_bytes(b"what macOS leaves behind")
    assert ImageMaskFolder(tmp_path, ABC).names == ("a", "b", "c")


def test_folder_takes_palette_bilevel_and_16_bit_masks(folder: Path) -> None:
    save_mask(folder / "masks/one.png", MASK, palette=True)
    with Image.open(folder / "masks/one.png") as mask:
        assert mask.mode == "P"
    Image.fromarray(np.array(MASK, dtype=np.uint16)).save(folder / "masks/two.png")
    dataset = ImageMaskFolder(folder, ABC)
    assert label(dataset, 0) == label(dataset, 1) == MASK
    Image.fromarray(np.array(MASK) == 1).save(folder / "masks/two.png")
    assert label(dataset, 1) == [[0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]


def test_value_map_changes_only_the_values_it_names(folder: Path) -> None:
    dataset = ImageMaskFolder(folder, ABC, value_map={0: 255, 255: 0, 2: 1})
    assert label(dataset) == [[255, 1, 1, 0], [255, 255, 1, 1], [1, 1, 1, 1]]


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.integers(0, 255), st.integers(0, 255)))
def test_label_tables_follow_any_value_map(value_map: dict[int, int]) -> None:
    table = datasets._label_table(value_map)
    assert table.tolist() == [value_map.get(value, value) for value in range(256)]


def test_transform_gets_image_and_label(folder: Path) -> None:
    augmentation = transforms.Augmentation(crop=6, resize_base=(24, 6))
    dataset = ImageMaskFolder(folder, ABC, transform=transforms.train_transform(augmentation))
    batch = next(iter(DataLoader(dataset, batch_size=2)))
    assert batch["image"].shape == (2, 3, 6, 6) and batch["image"].dtype == torch.float32
    assert batch["label"].shape == (2, 6, 6) and batch["label"].dtype == torch.int64
    assert batch["name"] == ["one", "two"]


def test_orientation_of_the_photograph_is_applied_before_the_sizes_are_compared(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise
    Image.new("RGB", (3, 4)).save(folder / "images/one.png", exif=exif)
    assert ImageMaskFolder(folder, ABC)[0]["image"].shape == (3, 3, 4)


def test_classes_are_read_from_the_folder(folder: Path) -> None:
    (folder / "classes.txt").write_text("\ufeffsky\n  old house \n\nroad\n", encoding="utf-8")
    split = ImageMaskFolder(folder).split
    assert (split.classes, split.unseen, split.name) == (("sky", "old house", "road"), (), folder.name)
    (folder / "unseen.txt").write_text("road\n")
    assert folder_split(folder).unseen == (2,)
    assert folder_split(folder, unseen=["sky"]).unseen == (0,)
    with pytest.raises(ValueError, match="has no class river; it has sky, old house, road"):
        folder_split(folder, unseen=["river"])


def test_folder_without_classes_says_so(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no classes.txt \(class names, one a line, or give the split"):
        ImageMaskFolder(folder)


def test_missing_folders_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no images/ \(the images\), masks/ \(the masks\); wanted"):
        ImageMaskFolder(tmp_path, ABC)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        ImageMaskFolder(tmp_path / "nowhere", ABC)


def test_no_images_and_no_names_are_refused(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="wanted at least one name listed"):
        ImageMaskFolder(folder, ABC, names=[])
    for path in (folder / "images").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no images from .*images; wanted files ending in .jpg"):
        ImageMaskFolder(folder, ABC)


def test_images_without_mask_are_counted_and_five_are_named(folder: Path) -> None:
    for i in range(7):
        save_image(folder / f"images/extra{i}.jpg")
    with pytest.raises(FileNotFoundError, match=r": 7 \(extra0, extra1, extra2, extra3, extra4, \.\.\.\); add them"):
        ImageMaskFolder(folder, ABC)
    assert len(ImageMaskFolder(folder, ABC, names=["two"])) == 1


def test_images_that_share_a_name_are_refused(folder: Path) -> None:
    save_image(folder / "images/one.jpg")
    with pytest.raises(ValueError, match="one.jpg and .*one.png have the same name"):
        ImageMaskFolder(folder, ABC)


def test_faulty_masks_are_refused_with_file_and_remedy(folder: Path) -> None:
    dataset, path = ImageMaskFolder(folder, ABC), folder / "masks/one.png"
    save_mask(path, [[0, 0], [0, 0]])
    with pytest.raises(ValueError, match=r"one.png is 2 x 2 pixels, its image .*one.png is 4 x 3"):
        dataset[0]
    save_image(path)
    with pytest.raises(ValueError, match=r"one.png is a mask of mode RGB; wanted one class index per pixel"):
        dataset[0]
    save_mask(path, [[0, 1, 2, 3]] * 3)
    with pytest.raises(ValueError, match=r"one.png has mask value 3, .* 'abc' \(0 to 2, .*value_map=\{3: 255\}"):
        dataset[0]
    assert label(ImageMaskFolder(folder, ABC, value_map={3: 255})) == [[0, 1, 2, 255]] * 3
    Image.fromarray(np.full((3, 4), 1000, dtype=np.uint16)).save(path)
    with pytest.raises(ValueError, match="mask value 1000, which is no class"):
        dataset[0]
    assert dataset[1]["name"] == "two"


def test_value_map_outside_8_bits_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="value_map has 1: 256; wanted"):
        ImageMaskFolder(folder, ABC, value_map={1: 256})


# ---------------------------------------------------------------- the published data sets


def voc(root: Path) -> Path:
    """Two images of the devkit (a val image among them) and one of SBD."""
    for name in ("2007_000001", "2007_000002", "2008_000003"):
        save_image(root / f"JPEGImages/{name}.jpg")
    mask = [[0, 0, 255, 1], [0, 255, 20, 20], [15, 15, 255, 0]]
    save_mask(root / "SegmentationClass/2007_000001.png", mask, palette=True)
    save_mask(root / "SegmentationClass/2007_000002.png", [[2] * 4] * 3, palette=True)
    save_mask(root / "SegmentationClassAug/2007_000001.png", [[3] * 4] * 3)
    save_mask(root / "SegmentationClassAug/2008_000003.png", [[4] * 4] * 3)
    save_list(root / "ImageSets/Segmentation/train.txt", "2007_000001")
    save_list(root / "ImageSets/Segmentation/val.txt", "2007_000002")
    return root


VOC_LABEL = [[255, 255, 255, 0], [255, 255, 19, 19], [14, 14, 255, 255]]


def test_voc2012(tmp_path: Path) -> None:
    root = voc(tmp_path)
    train, val = datasets.voc2012(root, "train"), datasets.voc2012(root, "val")
    assert train.split == splits.voc2012()
    assert (train.names, val.names) == (("2007_000001",), ("2007_000002",))
    assert label(train) == VOC_LABEL
    assert label(val) == [[1] * 4] * 3
    assert train.split.classes[19] == "tv monitor" and train.split.classes[14] == "person"


@pytest.mark.parametrize("layout", ["trainaug.txt", "aug.txt", "pairs"])
def test_voc2012_trainaug_in_its_three_list_forms(tmp_path: Path, layout: str) -> None:
    root, names = voc(tmp_path), ("2007_000001", "2008_000003")
    lists = root / "ImageSets/Segmentation"
    if layout == "trainaug.txt":
        save_list(lists / "trainaug.txt", *names)
    elif layout == "aug.txt":
        save_list(lists / "aug.txt", names[1])
    else:
        save_list(lists / "trainaug.txt", *(f"/JPEGImages/{n}.jpg /SegmentationClassAug/{n}.png" for n in names))
    dataset = datasets.voc2012(root, "trainaug")
    assert dataset.names == names
    assert label(dataset, 0) == VOC_LABEL, "VOC's own mask comes before SBD's"
    assert label(dataset, 1) == [[3] * 4] * 3


def test_ade20k(tmp_path: Path) -> None:
    save_image(tmp_path / "images/validation/ADE_val_00000001.jpg")
    mask = tmp_path / "annotations/validation/ADE_val_00000001.png"
    save_mask(mask, [[0, 1, 150, 13]] * 3)
    dataset = datasets.ade20k(tmp_path, "validation")
    assert label(dataset) == [[255, 0, 149, 12]] * 3
    assert dataset.split.names((0, 149, 12)) == ("wall", "flag", "person")
    save_mask(mask, [[0, 1, 151, 13]] * 3)
    with pytest.raises(ValueError, match="mask value 151"):
        dataset[0]


def test_camvid_layout(tmp_path: Path) -> None:
    save_image(tmp_path / "images/0001TP_006690.jpg")
    save_mask(tmp_path / "masks/0001TP_006690.png", [[0, 5, 10, 11]] * 3)
    assert label(datasets.camvid(tmp_path)) == [[0, 5, 10, 255]] * 3


def test_camvid_photographs() -> None:
    if not (CAMVID / "train/images").is_dir():
        pytest.skip(f"no CamVid in {CAMVID}; SPTSEG_CAMVID names its folder")
    train, val = datasets.camvid(CAMVID / "train"), datasets.camvid(CAMVID / "val")
    assert (len(train), len(val)) == (184, 101)
    assert not set(train.names) & set(val.names)
    present = set()
    for dataset, index in ((train, 0), (train, -1), (val, 50)):
        item = dataset[index]
        assert item["image"].shape == (3, 360, 480) and item["label"].shape == (360, 480)
        present |= set(item["label"].unique().tolist())
    assert {0, 1, 3, 8} <= present <= {*range(11), IGNORE}  # sky, building, road, car


@pytest.mark.parametrize(
    ("load", "wanted"),
    [
        (lambda root: datasets.voc2012(root, "val"), ("JPEGImages/", "SegmentationClass/", "Segmentation/val.txt")),
        (lambda root: datasets.voc2012(root, "trainaug"), ("benchmark_RELEASE/dataset/", "SegmentationClassAug/")),
        (lambda root: datasets.coco_stuff(root, "train"), ("images/train2017/", "annotations/train2017/")),
        (lambda root: datasets.context(root, "val"), ("trainval/", "SegmentationClassContext/", "Main/val.txt")),
        (lambda root: datasets.ade20k(root, "training"), ("images/training/", "annotations/training/")),
        (lambda root: datasets.camvid(root), ("images/", "masks/")),
    ],
)
def test_missing_data_sets_say_what_belongs_where(tmp_path: Path, load, wanted: tuple[str, ...]) -> None:
    with pytest.raises(FileNotFoundError) as error:
        load(tmp_path)
    message = str(error.value)
    assert str(tmp_path) in message and "\n" not in message
    assert all(part in message for part in wanted)


@pytest.mark.parametrize("load", [datasets.voc2012, datasets.coco_stuff, datasets.context, datasets.ade20k])
def test_unknown_subsets_are_refused(tmp_path: Path, load) -> None:
    with pytest.raises(ValueError, match="subset is 'test'; wanted one of 'train"):
        load(tmp_path, "test")


# ---------------------------------------------------------------- scenes


def test_scenes_are_drawn_alike_every_time_and_differ_by_index_seed_and_stream() -> None:
    dataset = datasets.Scenes(3, seed=5, size=64)
    assert (len(dataset), dataset.split) == (3, splits.scenes())
    item = dataset[1]
    assert isinstance(item["image"], tv_tensors.Image) and item["image"].dtype == torch.uint8
    assert item["image"].shape == (3, 64, 64) and item["label"].shape == (64, 64)
    assert item["label"].dtype == torch.int64
    image, mask = scenes.draw(seed=(0, 5, 1), size=64)
    assert np.array_equal(item["image"].permute(1, 2, 0), image) and np.array_equal(item["label"], mask)
    assert set(item["label"].unique().tolist()) <= {*range(41), IGNORE}
    assert torch.equal(item["image"], datasets.Scenes(2, seed=5, size=64)[1]["image"])
    others = (dataset[2], datasets.Scenes(3, 6, size=64)[1], datasets.Scenes(3, 5, "training", 64)[1])
    assert not any(torch.equal(item["image"], other["image"]) for other in others)
    assert len({item["name"], *(other["name"] for other in others)}) == 4


def test_scenes_end() -> None:
    assert sum(1 for _ in datasets.Scenes(2, size=64)) == 2  # pyright: ignore[reportArgumentType]
    with pytest.raises(IndexError, match="index is -1; wanted 0 to 1"):
        datasets.Scenes(2)[-1]


def test_faulty_scenes_are_refused() -> None:
    with pytest.raises(ValueError, match="length is 0"):
        datasets.Scenes(0)
    with pytest.raises(ValueError, match="stream is 'test'; wanted one of 'evaluation', 'training'"):
        datasets.Scenes(1, stream="test")  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------- single images


def pixel(path: Path) -> tuple[int, ...]:
    image = open_image(path)
    assert image.mode == "RGB"
    value = image.getpixel((0, 0))
    assert isinstance(value, tuple)
    return value


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(path)
    assert pixel(path) == (255, 255, 255)
    Image.new("LA", (2, 2), (0, 255)).save(path)
    assert pixel(path) == (0, 0, 0)
    Image.new("RGB", (2, 2), (9, 9, 9)).save(path, transparency=(9, 9, 9))
    assert pixel(path) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    palette.save(path, transparency=0)
    assert pixel(path) == (200, 100, 50)


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (257 * 99, 99), (65535, 255)])
def test_16_bits_are_scaled_to_8(tmp_path: Path, value: int, expected: int) -> None:
    for name in ("image.png", "image.tif"):
        Image.fromarray(np.full((2, 2), value, dtype=np.uint16)).save(tmp_path / name)
        assert pixel(tmp_path / name) == (expected,) * 3


def test_other_modes_become_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    red, green, blue = pixel(tmp_path / "print.jpg")
    assert red > 240 and green < 15 and blue < 15
    Image.new("1", (2, 2), 1).save(tmp_path / "bilevel.png")
    assert pixel(tmp_path / "bilevel.png") == (255, 255, 255)
    Image.new("L", (2, 2), 7).save(tmp_path / "grey.png")
    assert pixel(tmp_path / "grey.png") == (7, 7, 7)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_orientation_is_applied(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"turned.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (32, 16))
    image.paste((255, 255, 255), (0, 0, 16, 16))  # white at the left: at the top after the quarter turn
    image.save(path, exif=exif)
    upright = np.asarray(open_image(path))
    assert upright.shape == (32, 16, 3)
    assert upright[2, 8].min() > 200 and upright[-2, 8].max() < 50


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_damaged_exif_data_are_passed_over(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"odd.{suffix}"
    Image.new("RGB", (8, 4)).save(path, exif=b"Exif\x00\x00no TIFF header")  # Pillow raises for PNG and WebP
    assert open_image(path).size == (8, 4)


def test_images_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="none.jpg does not exist; wanted an image file"):
        open_image(tmp_path / "none.jpg")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        open_image(tmp_path)
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(ValueError, match=r"text.jpg is not an image that Pillow can read \(5 bytes\)"):
        open_image(tmp_path / "text.jpg")
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match=r"empty.png is not an image .* \(0 bytes\)"):
        open_image(tmp_path / "empty.png")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for suffix in ("jpg", "png", "webp", "tif"):
        whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
        noise.save(whole)
        cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        with pytest.raises(ValueError, match=f"cut.{suffix} is (damaged or cut off|not an image)"):
            open_image(cut)
    float_values = Image.fromarray(np.zeros((2, 2), dtype=np.float32))
    float_values.save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="float.tif holds floating-point values"):
        open_image(tmp_path / "float.tif")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="whole.png has more pixels than the safe limit of 1000"):
        open_image(tmp_path / "whole.png")  # 4096: Pillow's error
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="safe limit of 3000"):
        warnings.simplefilter("ignore")
        open_image(tmp_path / "whole.png")  # Pillow's warning


def test_32_bit_values_beyond_16_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 70000, dtype=np.int32)).save(tmp_path / "wide.tif")
    with pytest.raises(ValueError, match="grey values from 70000 to 70000; wanted 8 or 16 bits"):
        open_image(tmp_path / "wide.tif")
