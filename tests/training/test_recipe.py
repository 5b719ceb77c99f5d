"""The usual recipe of evaluation without training equals its plain twin, and stands beside the published figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused, small_clip
from torch.testing import assert_close
from torchvision import tv_tensors
from toys import toy_model

from sptseg.cli import main
from sptseg.datasets import Scenes
from sptseg.datasets.transforms import test_transform as transform_of
from sptseg.inference import augmentation, evaluate, segment
from sptseg.model import DENSE_CLIP, ModelConfig, build_model, read_out
from sptseg.training.presets import IMAGENET_TEMPLATES, beside_published, training_free


def test_the_recipe_equals_its_plain_twin() -> None:
    """Windows of 24 every 12 pixels, averaged, resized, softmax of 40 times these, the best of a class's words."""
    changes: dict[str, Any] = {"short_side": 40, "window_stride": 0.5, "bicubic": True, "softmax_scale": 40.0}
    clip = small_clip()
    config = {**DENSE_CLIP.__dict__, "clip": "small", "image_size": (24, 24), "readout": "naclip", **changes}
    model = build_model(ModelConfig(**config), clip).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (50, 65, 3), np.uint8)
    found = segment(model, pixels, ["grass|boat", "tree"], background="water")
    image = transform_of(augmentation(model.config))(tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1)))
    assert image.shape == (3, 40, 52)
    text = model.class_embeddings(["grass", "boat", "tree", "water"])
    total, count = torch.zeros(4, 40, 52), torch.zeros(40, 52)
    for y in (0, 12, 16):
        for x in (0, 12, 24, 28):
            patches, _ = read_out(clip.visual, image[None, :, y : y + 24, x : x + 24], "naclip", bicubic=True)
            cosine = torch.einsum("behw,ce->bchw", patches, text)
            total[:, y : y + 24, x : x + 24] += F.interpolate(cosine, (24, 24), mode="bilinear")[0]
            count[y : y + 24, x : x + 24] += 1
    words = (40 * F.interpolate((total / count)[None], (50, 65), mode="bilinear")[0]).softmax(dim=0)
    scores = torch.stack([words[:2].amax(0), words[2], words[3]])
    for i, name in enumerate(found.named.values()):
        assert_close(torch.from_numpy(found.scores(name)), scores[i], atol=1e-5, rtol=1e-4)
    labels = torch.from_numpy(np.where(found.labels == 255, 2, found.labels))
    assert_close(scores.gather(0, labels[None])[0], scores.amax(0), atol=1e-5, rtol=0)
    assert 0 < (labels == 2).float().mean() < 1


def test_the_recipe_of_each_data_set() -> None:
    sizes = {  # window, stride, short side, scale
        ("naclip", "voc2012"): (224, 112, 336, 40), ("naclip", "cityscapes"): (224, 112, 560, 40),
        ("sclip", "coco-stuff"): (224, 112, 448, 40), ("clearclip", "ade20k"): (448, 224, 448, 50),
        ("clearclip", "cityscapes"): (224, 224, 448, 50),
    }  # fmt: skip
    for (readout, layout), (window, stride, short, scale) in sizes.items():
        config = training_free("ViT-B-16-quickgelu", "openai", readout, layout)
        assert (config.readout, config.image_size, config.short_side) == (readout, (window, window), short)
        assert (config.window_stride * window, config.softmax_scale, config.normalization) == (stride, scale, "clip")
        assert config.bicubic and config.templates == IMAGENET_TEMPLATES and not config.trains
    assert len(set(IMAGENET_TEMPLATES)) == len(IMAGENET_TEMPLATES) == 80
    some = [IMAGENET_TEMPLATES[i] for i in (0, 39, 73, 79)]
    assert some == ["a bad photo of a {}.", "a photo of a {}.", "itap of a {}.", "a tattoo of the {}."]
    with pytest.raises(ValueError, match="softmax_scale is dense CLIP's"):
        toy_model(softmax_scale=40.0)


def test_published_figures_stand_beside_yours() -> None:
    naclip = training_free("ViT-B-16-quickgelu", "openai", "naclip")
    assert beside_published(naclip, "cityscapes", 0.3512)[0].splitlines()[-1] == "| naclip | Cityscapes | 35.5 | 35.1 |"
    for readout, layout, figure in (("gem", "voc2012", "79.9"), ("maskclip", "ade20k", "9.8 to 11.9")):
        config = training_free("ViT-B-16", "openai", readout)
        assert f"| {figure} | 50.0 |" in beside_published(config, layout, 0.5)[0]
    others = training_free("ViT-B-16-quickgelu", None, "naclip"), training_free("tiny")
    assert [beside_published(config, "voc2012", 0.5) for config in others] == [[], []]
    assert beside_published(naclip, "camvid", 0.5) == []


def test_evaluate_takes_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["evaluate", "--model", "training-free", "--readout", "naclip", "--images", "2"]
    main([*options, "--json", str(tmp_path / "a.json"), "--workers", "0"])
    data = Scenes(2)
    expected = evaluate(build_model(training_free("tiny", None, "naclip")), data, data.split, progress=False)
    assert json.loads((tmp_path / "a.json").read_text()) == expected.as_dict()
    capsys.readouterr()
    assert "readout is 'clip'; wanted one of plain" in refused(capsys, *options[:-3], "clip")
    tiny, plain = (build_model(training_free(name)) for name in ("tiny", "tiny-plain"))
    assert plain.config == replace(tiny.config, clip="tiny-plain", readout="naclip"), "both in their own words"
