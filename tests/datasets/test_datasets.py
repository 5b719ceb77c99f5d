"""Miniature data sets in the real layouts, label by label; and what is said about faulty ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from miniatures import mask, photograph
from numpy.typing import ArrayLike
from PIL import Image
from torchvision import tv_tensors
from toys import data_folder, noise

from sptseg import datasets, scenes
from sptseg.datasets import Data, ImageMaskFolder, Split, folder_split, splits
from sptseg.datasets.images import Note
from sptseg.training.state import identity

ABC = Split.from_names("abc", ["a", "b", "c"])


MASK = [[0, 1, 2, 255], [0, 0, 1, 1], [2, 2, 2, 2]]
PICTURE = noise(size=(4, 3))


def save_mask(path: Path, values: ArrayLike, kind: type = np.uint8) -> None:
    Image.fromarray(np.array(values, kind)).save(path)


def label(dataset: ImageMaskFolder) -> list[list[int]]:
    return dataset[0]["label"].tolist()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A healthy folder of two images."""
    return data_folder(tmp_path / "data", {"one": MASK, "two": MASK}, "abc")


def test_folder_items(folder: Path) -> None:
    dataset = ImageMaskFolder(folder, ABC)
    assert (len(dataset), dataset.split, dataset.names) == (2, ABC, ("one", "two"))
    item = dataset[0]
    assert isinstance(item["image"], tv_tensors.Image) and isinstance(item["label"], tv_tensors.Mask)
    assert item["image"].shape == (3, 3, 4) and (item["image"].dtype, item["label"].dtype) == (torch.uint8, torch.int64)
    assert np.array_equal(item["image"].permute(1, 2, 0), PICTURE)
    assert item["label"].tolist() == MASK
    assert item["name"] == "one"


def test_pairs_are_found_whatever_suffix_and_unicode_form(folder: Path) -> None:
    for picture, values in (("b.JPG", "b.PNG"), ("a.jfif", "a.png"), ("cafe\u0301.png", "caf\u00e9.png")):
        PICTURE.save(folder / "images" / picture)
        save_mask(folder / "masks" / values, MASK)
    (folder / "images/._a.jpg").write_bytes(b"what macOS leaves behind")
    assert ImageMaskFolder(folder).names == ("a", "b", "caf\u00e9", "one", "two")
    save_mask(folder / "masks/alone.png", MASK)
    with pytest.warns(Note, match="masks: left out 1 masks without an image: alone"):
        assert len(ImageMaskFolder(folder)) == 5
    (folder / "masks/alone.png").unlink()
    assert [label(ImageMaskFolder(folder, names=[name])) for name in ("b", "cafe\u0301")] == [MASK] * 2
    for twin in (folder / "images/one.JPG", folder / "masks/cafe\u0301.png"):
        PICTURE.save(twin)
        with pytest.raises(ValueError, match=f"{twin.name}.* are of one name; rename one, or take it away"):
            ImageMaskFolder(folder)
        twin.unlink()


def test_values_are_mapped_one_by_one(folder: Path) -> None:
    save_mask(folder / "masks/two.png", [[0, 1, 0, 2]] * 3, np.bool_)
    assert label(ImageMaskFolder(folder, names=["two"])) == [[0, 1, 0, 1]] * 3
    dataset = ImageMaskFolder(folder, ABC, value_map={0: 255, 255: 0, 2: 1})
    assert label(dataset) == [[255, 1, 1, 0], [255, 255, 1, 1], [1, 1, 1, 1]]
    dataset.map_values({65535: 2, 1: 255})
    save_mask(folder / "masks/one.png", [[0, 1, 65535, 255]] * 3, np.uint16)
    assert label(dataset) == [[255, 255, 2, 0]] * 3
    for wrong in ({1: 3}, {1: 256}, {-1: 0}, {65536: 0}):
        with pytest.raises(ValueError, match=r"cannot mean \d+; .* 0 to 65535, and labels from 0 to 2, or 255"):
            ImageMaskFolder(folder, ABC, value_map=wrong)


@pytest.mark.parametrize(
    ("options", "values", "labels"),
    [
        ({"values": " 127 = 1; 254=2,7=ignore"}, [0, 127, 254, 7], [0, 1, 2, 255]),
        ({"reduce_zero_label": True}, [0, 1, 2, 3], [255, 0, 1, 2]),
        ({"reduce_zero_label": True, "values": "255=2"}, [1, 255, 2, 0], [0, 2, 1, 255]),
    ],
)
def test_values_are_mapped_by_options(folder: Path, options: dict, values: list[int], labels: list[int]) -> None:
    save_mask(folder / "masks/one.png", [values] * 3)
    plain, _ = Data(str(folder)).load("evaluation")
    mapped, _ = Data(str(folder), **options).load("training")
    assert label(mapped) == [labels] * 3
    assert identity(mapped) != identity(plain) == identity(ImageMaskFolder(folder)), "runs tell them apart"
    for wrong in ("255", "255=moon", "255=1,255=2", "-1=0", "1=9"):
        with pytest.raises(ValueError, match="--values is .* each value once|cannot mean 9"):
            Data(str(folder), values=wrong).load("evaluation")


@pytest.mark.parametrize(
    "content",
    [
        "sky\n  old  house \nroad\n\n \n", "sky\r\nold house\r\nroad", "\ufeffsky\nold house\nroad",
        "0: sky\n1: old house\n2: road", "0 sky\n1 old house\n2 road", "0. sky\n1. old house\n2. road",
    ],
)  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_classes_are_read_by_position(tmp_path: Path, content: str, encoding: str) -> None:
    (tmp_path / "classes.txt").write_bytes(content.encode(encoding))
    split = folder_split(tmp_path)
    assert (split.classes, split.unseen, split.name) == (("sky", "old house", "road"), (), tmp_path.name)
    (tmp_path / "unseen.txt").write_bytes("\nroad\n".encode(encoding))
    assert folder_split(tmp_path).unseen == (2,)
    (tmp_path / "unseen.txt").write_bytes("river".encode(encoding))
    with pytest.raises(ValueError, match="has no class river; it has sky, old house, road"):
        folder_split(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"sky\n\nroad\n", "line 2 is '';"), (b"", "line 1 is '';"),
        (b"1: sky\n2: road\n", "line 1 is '1: sky'; wanted the name of the class with mask value 0"),
        (b"1 sky\n2 road\n", "line 1 is '1 sky'"), (b"0: sky\n2: road\n", "line 1 is '0: sky'"),
        (b"sky: 0\nroad: 1\n", "line 1 is 'sky: 0'"), (b"sky\n# roads\nroad\n", "line 2 is '# roads'"),
        (b"sky,\nroad", "line 1 is 'sky,'"), (b"- sky\n- road", "line 1 is '- sky'"), (b"[\n'sky',", r"line 1 is '\['"),
        (b'"sky"', "line 1 is '\"sky\"'"), (b"sky\t70 9 9", r"line 1 is 'sky\\t70 9 9'"), (b"sky\x0croad", "line 1 is"),
        ("café".encode("latin-1"), "save it as UTF-8"), ("sky\n".encode("utf-16-le"), "save it as UTF-8"),
    ],
)  # fmt: skip
def test_class_files_that_would_shift_names_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path / 'classes.txt'}(,| is no text).*{message}"):
        folder_split(tmp_path)


def test_what_is_missing_is_named(folder: Path) -> None:
    (folder / "classes.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no classes.txt \(class names, one a line, or give the split"):
        ImageMaskFolder(folder)
    with pytest.raises(FileNotFoundError, match=r"has no images/ \(the images\), masks/ \(the masks\); wanted"):
        ImageMaskFolder(folder / "images", ABC)
    with pytest.raises(FileNotFoundError, match="wanted at least one name listed"):
        ImageMaskFolder(folder, ABC, names=[])
    for i in range(7):
        PICTURE.save(folder / f"images/extra{i}.jpg")
    with pytest.raises(FileNotFoundError, match=r": 7 \(extra0, extra1, extra2, extra3, extra4 and 2 more\); add them"):
        ImageMaskFolder(folder, ABC)
    assert len(ImageMaskFolder(folder, ABC, names=["two"])) == 1


def test_faulty_masks_are_refused_with_file_and_remedy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = ImageMaskFolder(folder, ABC)
    for values, message in (
        ([[0, 0], [0, 0]], r"one.png is 2 x 2 pixels, its image .*one.png is 4 x 3"),
        (np.array(PICTURE), r"one.png is a mask of mode RGB; wanted one class index per pixel"),
        ([[0, 1, 2, 3]] * 3, r"mask value 3, .*'abc' \(0 to 2; .*--values 3=ignore.*value_map=\{3: 255\}"),
        ([[0, 9, 254, 9]] * 3, "mask values 9, 254, no class"),
    ):
        save_mask(folder / "masks/one.png", values)
        with pytest.raises(ValueError, match=message):
            dataset[0]
    assert dataset[1]["name"] == "two"
    save_mask(folder / "masks/one.png", MASK)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 11)
    with pytest.raises(ValueError, match=r"more pixels than the safe limit of 11; .*--max-pixels"):
        label(ImageMaskFolder(folder))
    assert label(Data(str(folder), max_pixels=12).load("evaluation")[0]) == MASK


def test_ade20k_and_camvid(tmp_path: Path) -> None:
    photograph(tmp_path / "images/validation/ADE_val_1.jpg")
    mask(tmp_path / "annotations/validation/ADE_val_1.png", 0, 1, 150, 13)
    dataset = datasets.ade20k(tmp_path, "validation")
    assert label(dataset)[0][::16] == [255, 0, 149, 12]
    assert dataset.split.names((0, 149, 12)) == ("wall", "flag", "person")
    mask(tmp_path / "annotations/validation/ADE_val_1.png", 0, 1, 151, 13)
    with pytest.raises(ValueError, match="mask value 151"):
        dataset[0]
    with pytest.raises(ValueError, match="ade20k: subset is 'test'; wanted one of 'training', 'validation'"):
        datasets.ade20k(tmp_path, "test")
    photograph(tmp_path / "camvid/images/0001TP.jpg")
    mask(tmp_path / "camvid/masks/0001TP.png", 0, 5, 10, 11)
    with pytest.raises(ValueError, match="as camvid, has no subsets"):
        Data(str(tmp_path / "camvid"), "camvid", subset="train").load("training")
    named, _ = Data(str(tmp_path / "camvid"), "camvid").load("training")
    assert label(named)[0][::16] == label(datasets.camvid(tmp_path / "camvid"))[0][::16] == [0, 5, 10, 255]


def test_scenes_are_drawn_alike_every_time_and_differ_by_index_seed_and_stream() -> None:
    dataset = datasets.Scenes(3, seed=5, size=64)
    assert (len(dataset), dataset.split) == (3, splits.scenes())
    item = dataset[1]
    assert isinstance(item["image"], tv_tensors.Image) and item["image"].dtype == torch.uint8
    image, labels = scenes.draw(seed=(0, 5, 1), size=64)
    assert np.array_equal(item["image"].permute(1, 2, 0), image) and np.array_equal(item["label"], labels)
    others = (dataset[2], datasets.Scenes(3, 6, size=64)[1], datasets.Scenes(3, 5, "training", 64)[1])
    assert len({each["image"].numpy().tobytes() for each in (item, *others)}) == 4
    with pytest.raises(IndexError, match="index is -1; wanted 0 to 1"):
        datasets.Scenes(2)[-1]
