"""Windows and labels against plain twins, at any size; none of these, several words, masks for other tools."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import small_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torch.testing import assert_close
from torchvision import tv_tensors
from toys import data_folder, toy_model

from sptseg.analysis.failures import collect
from sptseg.datasets import BACKGROUND, IMAGENET_MEAN, ImageMaskFolder, as_array
from sptseg.datasets.transforms import test_transform as transform_of
from sptseg.inference import Segmentation, at_precision, augmentation, evaluate, segment, window_logits, windows
from sptseg.inference.segmentation import CocoMasks, resolved, told
from sptseg.model import SptSeg

MODEL = toy_model().eval()
CLASSES = ("grass", "water", "tree")
sides = st.integers(1, 90)
few = settings(max_examples=25, deadline=None)


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8)


@torch.no_grad()
def plain_scores(model: SptSeg, image: Tensor, text: Tensor, offset: Tensor, size: tuple[int, int]) -> Tensor:
    """C x H x W at once: window by window at full size, sigmoid, averaged, lowered, resized."""
    height, width = image.shape[1:]
    patch = model.encoder.patch_size[0]
    window = model.config.image_size
    total, count = torch.zeros(len(text), height, width), torch.zeros(height, width)
    stride = [round(side * 426 / 512) for side in window]
    # from each step on that the window before left something of, flush with the end
    tops, lefts = (
        sorted({max(0, min(start, end - side)) for start in range(0, max(1, end - side + step), step)})
        for end, side, step in zip((height, width), window, stride, strict=True)
    )
    for top, left in itertools.product(tops, lefts):
        here = slice(top, top + window[0]), slice(left, left + window[1])
        crop = image[:, *here]
        h, w = crop.shape[1:]
        padded = F.pad(crop, (0, -w % patch, 0, -h % patch))
        logits = F.interpolate(model(padded[None], text), size=padded.shape[1:], mode="bilinear", align_corners=False)
        total[:, *here] += logits[0, :, :h, :w].sigmoid()
        count[here] += 1
    scores = total / count - offset[:, None, None]
    return F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0]


@given(length=st.integers(1, 400), window=st.integers(1, 60), data=st.data())
def test_windows_along_an_axis_leave_no_gap_and_end_flush(length: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    starts = windows.window_starts(length, window, stride)
    assert starts[0] == 0 and starts[-1] == max(0, length - window)
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert all(0 < gap <= stride for gap in gaps) and gaps[:-1] == [stride] * len(gaps[:-1])
    protocol = [(0, 0, 512, 512), (0, 426, 512, 512), (0, 488, 512, 512)]
    assert windows.windows_of((512, 1000), (512, 512)) == protocol


@few
@given(sides, sides, st.none() | st.tuples(sides, sides), st.integers(1, 6), st.integers(1, 9))
def test_streamed_labels_are_the_argmax_of_plain_scores(
    height: int, width: int, out: tuple[int, int] | None, at_once: int, batch: int
) -> None:
    generator = torch.Generator().manual_seed(height * 100 + width)
    image = torch.randn(3, height, width, generator=generator)
    text = F.normalize(torch.randn(5, 32, generator=generator), dim=-1)
    offset = torch.tensor([0.0, 0.1, 0.0, 0.05, 0.1])
    size = out or (height, width)
    (found,) = window_logits(MODEL, image[None], text, offset=offset, window_batch=batch)
    expected = plain_scores(MODEL, image, text, offset, size)
    assert_close(found.scores(slice(None), size), expected, atol=1e-5, rtol=1e-5)
    labels = found.labels(size, at_once)
    assert labels.shape == size and labels.dtype == torch.int64
    chosen = expected.gather(0, labels[None])[0]
    assert_close(chosen, expected.max(dim=0).values, atol=1e-5, rtol=0)  # rounding may swap equals, nothing else


@pytest.mark.parametrize("said", ["DefaultCPUAllocator: can't allocate memory", "CUDA out of memory. Tried"])
def test_where_memory_runs_out_fewer_windows_go_at_once(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for 1 window: after 4 and 2 at once all come one by one, and are as they are in a batch."""
    images, text = torch.randn(3, 3, 32, 150), F.normalize(torch.randn(4, 32), dim=-1)
    forward, tried = MODEL.forward, []
    expected = window_logits(MODEL, images, text, window_batch=4)

    def small(images: Tensor, *rest: Tensor) -> Tensor:
        tried.append(len(images))
        if len(images) > 1:
            raise RuntimeError(said)
        return forward(images, *rest)

    monkeypatch.setattr(MODEL, "forward", small)
    with pytest.warns(UserWarning) as warned:
        found = [window_logits(MODEL, image[None], text, window_batch=4)[0] for image in images]
    assert str(warned[0].message) == "memory ran out with 4 windows at once; going on with 2"
    windows_of_one = len(expected[0].boxes)
    assert tried == [4, 2, *[1] * windows_of_one] * 3
    for one, other in zip(found, expected, strict=True):
        assert_close(one.logits, other.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("start", ["random", "dense_clip"])
@pytest.mark.parametrize("decoder", ["spectral", "cross_attention", "none"])
def test_narrow_weights_give_nearly_the_same_scores(decoder: str, start: str) -> None:
    """The copy's weights are bfloat16 but for the spectral filter and the logits' scale; the model stays as it was."""
    model = toy_model(decoder=decoder, start=start).eval()
    narrow = at_precision(model, "bf16")
    wide_ones = {name for name, value in narrow.named_parameters() if value.dtype == torch.float32}
    exact = {"encoder.spectral_prompt.weight", "decoder.log_scale", "decoder.threshold"}
    assert wide_ones == exact & {*dict(model.named_parameters())}
    text_tower: Any = narrow.clip.model
    assert {value.dtype for value in model.parameters()} == {torch.float32} == {text_tower.token_embedding.weight.dtype}
    assert at_precision(model, "no") is model
    image, text = torch.randn(1, 3, 32, 70), F.normalize(torch.randn(5, 32), dim=-1)
    (wide,), (short,) = (window_logits(each, image, text) for each in (model, narrow))
    assert short.logits.dtype == torch.float32
    scale = wide.logits.abs().max().item()
    assert (short.logits - wide.logits).abs().mean() < 0.02 * scale


@pytest.mark.parametrize("full_resolution", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (31, 33), (101, 37), (40, 150), (60, 1)])
def test_segment_equals_the_plain_way_at_any_size(size: tuple[int, int], full_resolution: bool) -> None:
    pixels = picture(*size)
    model = toy_model(seen_offset=0.9).eval()  # which is of evaluation: a user's classes are neither seen nor unseen
    found = segment(model, pixels, CLASSES, full_resolution=full_resolution)
    assert found.labels.shape == size and found.labels.dtype == np.int64
    made = augmentation(MODEL.config, full_resolution=full_resolution)
    assert (made.crop, made.resize_base, made.mean) == (32, None if full_resolution else (128, 32), IMAGENET_MEAN)
    prepare = transform_of(made)
    prepared = prepare(tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1)))
    assert not full_resolution or min(size) < 32 or found.logits.size == size, "every pixel is looked at"
    assert min(prepared.shape[1:]) >= 32 or max(prepared.shape[1:]) == 32 * 32  # a strip is not enlarged beyond that
    expected = plain_scores(MODEL, prepared, MODEL.class_embeddings(CLASSES), torch.zeros(3), size)
    for i, name in enumerate(CLASSES):
        scores = found.scores(name)
        assert scores.dtype == np.float32 and 0 <= scores.min() <= scores.max() <= 1
        assert_close(torch.from_numpy(scores), expected[i], atol=1e-5, rtol=1e-5)
    chosen = expected.gather(0, torch.from_numpy(found.labels)[None])[0]
    assert_close(chosen, expected.max(dim=0).values, atol=1e-5, rtol=0)


def test_pictures_come_as_arrays_pil_images_and_files(tmp_path: Path) -> None:
    """And as views with negative strides, as of mirrored pictures, or BGR ones turned to RGB."""
    pixels = picture(20, 30)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    given_as = [pixels, pixels[:, ::-1].copy()[:, ::-1], Image.fromarray(pixels), tmp_path / "a.png"]
    results = [segment(MODEL, image, CLASSES) for image in [*given_as, str(tmp_path / "a.png")]]
    for result in results:
        assert np.array_equal(result.image, pixels) and np.array_equal(result.labels, results[0].labels)
    assert as_array(Image.fromarray(pixels[..., 0])).shape == (20, 30, 3)


def test_what_does_not_go_is_refused_and_palettes_have_a_colour_for_each_class() -> None:
    pixels, colours = picture(8, 8), [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    refusals: list[tuple[Any, Any, str]] = [
        (np.zeros((4, 4, 3)), CLASSES, r"float64 of shape \(4, 4, 3\); wanted uint8 of shape \(height, width"),
        (np.zeros((3, 4, 4), np.uint8), CLASSES, r"uint8 of shape \(3, 4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), CLASSES, r"uint8 of shape \(0, 4, 3\)"),
        (pixels, "tree", r"is the text 'tree'; wanted a list of names, such as \['tree', 'car'\]"),
        (pixels, CLASSES[:2], "3 colours for 2 classes"),
    ]
    for image, classes, message in refusals:
        with pytest.raises(ValueError, match=message):
            segment(MODEL, image, classes, palette=colours)
    assert segment(MODEL, pixels, CLASSES, palette=colours).palette == tuple(colours)


PICTURE = np.random.default_rng(3).integers(0, 256, (40, 70, 3), np.uint8)
WORDS = ["grass", "water", "tree", "boat", "house"]


@pytest.fixture(scope="module")
def plain() -> Segmentation:
    """Each word a class of its own."""
    return segment(MODEL, PICTURE, WORDS)


def test_a_classs_score_is_the_highest_of_its_words_and_the_backgrounds_pixels_have_none(plain: Segmentation) -> None:
    found = segment(MODEL, PICTURE, ["grass|boat", "tree"], background=["water", "house"])
    assert found.background == ("water", "house") and found.named == {0: "grass", 1: "tree", 255: "none"}
    expected = np.array([0, 255, 1, 0, 255])[plain.labels]
    assert np.array_equal(found.labels, expected) and len(np.unique(expected)) == 3
    for name, words in {"grass": ("grass", "boat"), "none": ("water", "house")}.items():
        np.testing.assert_allclose(found.scores(name), np.maximum(*map(plain.scores, words)), atol=1e-6)
    shares = {name: np.mean(expected == label) for name, label in (("grass", 0), ("tree", 1), ("none", 255))}
    assert found.areas() == pytest.approx(shares)
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
    found = windows.WindowLogits(logits, [(0, 0, 4, 4)], (4, 4), (4, 4), torch.zeros(5), [0, 0, 1, 2, 3])
    for at_once in (1, 2, 5):
        assert (found.labels((4, 4), at_once) == 0).all()
        assert (found.best((4, 4), at_once, classes=[1, 3])[1] == 3).all()


def test_words_of_the_background() -> None:
    clip = small_clip()
    known = ("grass", "water", "house", "tree", "boat")
    assert resolved("usual", clip, ["sea"]) == known, "of the drawn world's, those it knows"
    assert len(BACKGROUND) == len(set(BACKGROUND)) == 26
    assert told(["grass|boat", "tree"], ["water"]) == (["grass", "boat", "tree", "water"], [0, 0, 1, 2])
    for words in ("usual", "house, Grass; water|boat"):
        assert sorted(map(str.lower, resolved(words, clip, ["tree|boat"]))) == ["grass", "house", "water"]
    refusals = {1.5: "score 1.5; wanted", "-.5": "score -0.5", "tree": "no word that is not a class's", "": "no word"}
    for words, message in refusals.items():
        with pytest.raises(ValueError, match=message):
            resolved(words, clip, ["tree"])
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
        mask = pictures[coco.imgs[each["image_id"]]["file_name"]] == each["category_id"] - 1
        assert np.array_equal(coco.annToMask(each), mask) and each["area"] == mask.sum()
        rows, columns = np.nonzero(mask)
        assert each["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]


def test_files_of_a_segmentation(plain: Segmentation, tmp_path: Path) -> None:
    found = segment(MODEL, PICTURE, ["grass", "tree"], background="water")
    for suffix, start in {"png": b"\x89PNG", "pdf": b"%PDF", "jpg": b"\xff\xd8\xff"}.items():
        found.save(tmp_path / f"a.{suffix}")
        assert (tmp_path / f"a.{suffix}").read_bytes().startswith(start)
    found.save_labels(tmp_path / "labels.png")
    plain.save_labels(tmp_path / "plain.png")
    for name, result in {"labels": found, "plain": plain}.items():
        colours = np.pad(result.palette, ((0, 256 - len(result.palette)), (0, 0)), constant_values=255)  # else white
        with Image.open(tmp_path / f"{name}.png") as file:
            assert file.mode == "P" and np.array_equal(np.asarray(file), result.labels)
            assert np.array_equal(np.asarray(file.convert("RGB")), colours[result.labels])
    found.save_scores(tmp_path / "scores.npz")
    with np.load(tmp_path / "scores.npz") as file:
        assert file["names"].tolist() == ["grass", "tree", "none"] and file["scores"].shape == (3, 8, 14)
        height, width = found.logits.size  # 32 x 56, in patches of 4 x 4
        expected = found.logits.scores([1], (height, width)).view(8, 4, 14, 4).mean(dim=(1, 3))
        assert_close(torch.from_numpy(file["scores"][1]), expected)
    assert json.loads(json.dumps(found.named)) == {"0": "grass", "1": "tree", "255": "none"}
