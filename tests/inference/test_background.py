"""None of these, several words for a class, and masks that other tools read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import small_clip
from PIL import Image
from pycocotools.coco import COCO
from torch.testing import assert_close
from toys import data_folder, toy_model

from sptseg.analysis.failures import collect
from sptseg.datasets import BACKGROUND, ImageMaskFolder
from sptseg.inference import Segmentation, WindowLogits, evaluate, segment
from sptseg.inference.segmentation import CocoMasks, resolved, told

MODEL = toy_model().eval()
PICTURE = np.random.default_rng(3).integers(0, 256, (40, 70, 3), np.uint8)
WORDS = ["grass", "water", "tree", "boat", "house"]


@pytest.fixture(scope="module")
def plain() -> Segmentation:
    """Each word a class of its own."""
    return segment(MODEL, PICTURE, WORDS)


def test_a_classs_score_is_the_highest_of_its_words_and_the_backgrounds_pixels_have_none(plain: Segmentation) -> None:
    found = segment(MODEL, PICTURE, ["grass|boat", "tree"], background=["water", "house"])
    assert found.classes == ("grass", "tree") and found.background == ("water", "house") and found.none == 255
    expected = np.array([0, 255, 1, 0, 255])[plain.labels]
    assert np.array_equal(found.labels, expected) and len(np.unique(expected)) == 3
    for name, words in {"grass": ("grass", "boat"), "none": ("water", "house")}.items():
        np.testing.assert_allclose(found.scores(name), np.maximum(*map(plain.scores, words)), atol=1e-6)
    shares = {name: np.mean(expected == label) for name, label in (("grass", 0), ("tree", 1), ("none", 255))}
    assert found.areas() == pytest.approx(shares)
    assert list(found.named.items()) == [(0, "grass"), (1, "tree"), (255, "none")]
    none = found.overlay()[expected == 255]  # 0.55 of white, grey; borders are dark
    assert np.mean((none == none[:, :1]).all(axis=1)) == 1 and found.show()


def test_what_reaches_no_threshold_is_none(plain: Segmentation) -> None:
    best = np.max([plain.scores(word) for word in WORDS], axis=0)
    least = float(np.quantile(best, 0.3))
    found = segment(MODEL, PICTURE, WORDS, background=least)
    assert np.array_equal(found.labels, np.where(best < least, 255, plain.labels))
    assert found.areas()["none"] == pytest.approx(0.3, abs=0.01)
    with pytest.raises(ValueError, match="'none' was not among the classes"):
        found.scores("none")


def test_of_equal_words_the_first_class_is_taken_at_any_number_at_once() -> None:
    logits = torch.tensor([-1.0, 2.0, 0.0, 2.0, 1.0]).view(1, 5, 1, 1)
    found = WindowLogits(logits, [(0, 0, 4, 4)], (4, 4), (4, 4), torch.zeros(5), [0, 0, 1, 2, 3])
    for at_once in (1, 2, 5):
        assert (found.labels((4, 4), at_once) == 0).all()
        assert (found.best((4, 4), at_once, classes=[1, 3])[1] == 3).all()


def test_words_of_the_background() -> None:
    clip = small_clip()
    known = ("grass", "water", "house", "tree", "boat")
    assert resolved("usual", clip, ["sea"]) == known, "of the drawn world's, those it knows"
    assert len(BACKGROUND) == len(set(BACKGROUND)) == 26
    assert told(["grass|boat", "tree"], ["water"]) == (["grass", "boat", "tree", "water"], [0, 0, 1, 2])
    for given in ("usual", "house, Grass; water|boat"):
        assert sorted(map(str.lower, resolved(given, clip, ["tree|boat"]))) == ["grass", "house", "water"]
    refusals = {1.5: "score 1.5; wanted", "-.5": "score -0.5", "tree": "no word that is not a class's", "": "no word"}
    for given, message in refusals.items():
        with pytest.raises(ValueError, match=message):
            resolved(given, clip, ["tree"])
    for classes in (["grass|", "tree"], ["grass", "tree|grass"], ["none", "tree"]):
        with pytest.raises(ValueError, match="position 1 is blank|given twice: grass|a class is called 'none'"):
            segment(MODEL, PICTURE, classes, background=0.1)


def test_several_words_in_classes_txt(tmp_path: Path) -> None:
    """The class goes by the first; evaluation takes the best of its words, training the mean of their embeddings."""
    masks = {"a": np.indices((32, 48)).sum(0) % 2}
    data = ImageMaskFolder(data_folder(tmp_path, masks, ["grass|boat", "tree"]))
    assert data.split.classes == ("grass", "tree") and data.split.texts() == ("grass|boat", "tree")
    scores = evaluate(MODEL, data, data.split, progress=False)
    labels = segment(MODEL, data[0]["image"].permute(1, 2, 0).numpy(), ["grass|boat", "tree"]).labels
    assert scores.pixel_accuracy == pytest.approx(np.mean(labels == masks["a"]))
    assert np.array_equal(collect(MODEL, data, data.split).pictures[0].predicted, labels)
    one, other = MODEL.class_embeddings(["grass", "boat"])
    assert_close(MODEL.class_embeddings(["grass|boat"])[0], F.normalize(one + other, dim=0))


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of pycocotools under numpy 2
def test_coco_json_comes_back_with_pycocotools(tmp_path: Path) -> None:
    pictures = {"a.jpg": np.repeat([[0, 0, 255], [2, 255, 2]], 3, axis=0), "b.jpg": np.full((4, 5), 1)}
    masks = CocoMasks(["grass", "tree", "boat"])
    for name, labels in pictures.items():
        masks.add(name, labels)
    (tmp_path / "coco.json").write_text(masks.json())
    coco = COCO(tmp_path / "coco.json")
    assert [each["name"] for each in coco.loadCats([1, 2, 3])] == ["grass", "tree", "boat"]
    assert [(each["image_id"], each["category_id"]) for each in coco.anns.values()] == [(1, 1), (1, 3), (2, 2)]
    for each in coco.anns.values():
        labels = pictures[coco.imgs[each["image_id"]]["file_name"]]
        assert np.array_equal(coco.annToMask(each), labels == each["category_id"] - 1)
        rows, columns = np.nonzero(labels == each["category_id"] - 1)
        box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert each["area"] == len(rows) and each["bbox"] == box


def test_files_of_a_segmentation(plain: Segmentation, tmp_path: Path) -> None:
    found = segment(MODEL, PICTURE, ["grass", "tree"], background="water")
    for suffix, start in {"png": b"\x89PNG", "pdf": b"%PDF", "jpg": b"\xff\xd8\xff"}.items():
        found.save(tmp_path / f"a.{suffix}")
        assert (tmp_path / f"a.{suffix}").read_bytes().startswith(start)
    found.save_labels(tmp_path / "labels.png")
    colours = np.concatenate([found.palette, np.full((254, 3), 255)])  # white from 2 to 255
    with Image.open(tmp_path / "labels.png") as file:
        assert file.mode == "P" and np.array_equal(np.asarray(file), found.labels) and (found.labels == 255).any()
        assert np.array_equal(np.asarray(file.convert("RGB")), colours[found.labels])
    found.save_scores(tmp_path / "scores.npz")
    with np.load(tmp_path / "scores.npz") as file:
        assert file["names"].tolist() == ["grass", "tree", "none"] and file["scores"].shape == (3, 8, 14)
        height, width = found.logits.size  # 32 x 56, in patches of 4 x 4
        expected = found.logits.scores([1], (height, width)).view(8, 4, 14, 4).mean(dim=(1, 3))
        assert_close(torch.from_numpy(file["scores"][1]), expected)
    assert json.loads(json.dumps(found.named)) == {"0": "grass", "1": "tree", "255": "none"}
