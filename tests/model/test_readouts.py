"""Read-outs against the published implementations' tensors and plain twins; with prompts, in bf16; what is refused."""

from __future__ import annotations

import ast
from dataclasses import replace
from typing import Any

import numpy as np
import plain
import pytest
import torch
import torch.nn.functional as F
from conftest import REFERENCE, small_clip
from open_clip.model import _build_vision_tower
from safetensors import safe_open
from torch import nn
from torch.testing import assert_close

import sptseg
from sptseg.cli.commands import Which
from sptseg.inference import at_precision, segment
from sptseg.model import DENSE_CLIP, ModelConfig, build_model, readouts
from sptseg.model.clip import Clip, load_clip
from sptseg.model.ops import grid_to_tokens
from sptseg.model.readouts import OPTIONS, gaussian, read_out
from sptseg.model.towers import embed

KEYS = {  # of the reference set
    "vanilla": ("plain", {}), "maskclip": ("maskclip", {}), "maskclip_bare": ("maskclip", {"bare": True}),
    "sclip": ("sclip", {}), "sclip_bare": ("sclip", {"bare": True}), "clearclip": ("clearclip", {}),
    "naclip": ("naclip", {}), "naclip_std2": ("naclip", {"sigma": 2.0}),
    "naclip_vanilla": ("naclip", {"bare": False}), "kk_reduced": ("naclip", {"sigma": None}),
    "gem_depth3": ("gem", {"blocks": 2}),
}  # fmt: skip
SMALL = {"clip": "small", "image_size": (32, 32), "dropout": 0.0}


@torch.no_grad()
def test_read_outs_equal_the_published_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    with safe_open(REFERENCE / "readouts_small.safetensors", "pt") as file:
        config = ast.literal_eval(file.metadata()["config"])
        reference = {name: file.get_tensor(name) for name in file.keys()}
    visual: Any = _build_vision_tower(reference["visual.proj"].shape[1], config, quick_gelu=True)
    own = {name.removeprefix("visual."): value for name, value in reference.items() if name.startswith("visual.")}
    missing = visual.load_state_dict(own, strict=False).missing_keys
    assert set(missing) == {"conv1.weight", "positional_embedding"}, "what makes tokens of a picture: they are given"
    monkeypatch.setattr(readouts, "embed", lambda *_, **__: reference["input"])
    given = {key.removeprefix("tokens.") for key in reference if key.startswith("tokens.")}
    assert {*KEYS, "gaussian_5x8"} == given, "every key of the set is looked at"
    for key, (name, options) in KEYS.items():
        patches, image = read_out(visual, torch.zeros(1, 3, 48, 48), name, **options)
        expected = F.normalize(reference[f"tokens.{key}"], dim=-1)
        assert_close(grid_to_tokens(patches), expected, atol=1e-5, rtol=0, msg=key)
        assert_close(image, F.normalize(reference["image_embedding"], dim=-1), atol=1e-5, rtol=0)
    found = gaussian((5, 8), 5.0, torch.device("cpu"), torch.float32)
    assert_close(found, reference["tokens.gaussian_5x8"], atol=1e-6, rtol=0)


def away_from_zeros(clip: Clip) -> Clip:
    """Biases start at 0 and norms at 1, which hide what is left out."""
    for parameter in clip.visual.parameters():
        nn.init.normal_(parameter, std=0.2)
    return clip


@pytest.mark.parametrize("size", [(20, 44), (92, 96)])  # 5 x 11 patches; 23 x 24, whose heads go one by one
@pytest.mark.parametrize(
    ("name", "options"),
    [*KEYS.values(), ("clearclip", {"bare": False}), ("gem", {}), ("gem", {"blocks": 1})],
    ids=str,
)
def test_read_outs_equal_their_plain_twins(name: str, options: dict[str, Any], size: tuple[int, int]) -> None:
    clip = away_from_zeros(small_clip(ls_init_value=0.5)).visual
    images = torch.randn(2, 3, *size, requires_grad=True)
    grid = size[0] // 4, size[1] // 4
    x = embed(clip, images)
    if name == "gem":
        expected = plain.gem(clip, x, options.get("blocks", 3))
    else:
        for block in clip.transformer.resblocks[:-1]:
            x = block(x)
        last = clip.transformer.resblocks[-1]
        expected = last(x) if name == "plain" else plain.read_block(last, x, grid, name, **(OPTIONS[name] | options))
    expected = F.normalize(clip.ln_post(expected) @ clip.proj, dim=-1)
    patches, image = read_out(clip, images, name, **options)
    ours = torch.cat([image[:, None], grid_to_tokens(patches)], dim=1)
    assert patches.shape == (2, 32, *grid)
    assert_close(ours, expected, atol=1e-5, rtol=0)
    cotangent = torch.randn_like(ours)
    gradient, wanted = (torch.autograd.grad(value, images, cotangent)[0] for value in (ours, expected))
    assert (gradient - wanted).norm() < 1e-3 * wanted.norm()


@torch.no_grad()
def test_position_embeddings_are_resized_bicubically_on_request() -> None:
    visual = small_clip().visual
    images = torch.randn(1, 3, 20, 44)
    found, _ = read_out(visual, images, "naclip", bicubic=True)
    positions = visual.positional_embedding[1:].T.unflatten(1, (8, 8))[None]
    resized = F.interpolate(positions, (5, 11), mode="bicubic", align_corners=False)[0].flatten(1).T
    visual.positional_embedding = nn.Parameter(torch.cat([visual.positional_embedding[:1], resized]))
    visual.grid_size = (5, 11)
    assert_close(found, read_out(visual, images, "naclip")[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("other", {}, r"no read-out 'other' with no options; choose plain \(no options\), m"),
        ("sclip", {"sigma": 5.0}, r"no read-out 'sclip' with sigma; choose .*, naclip \(bare, sigma\), gem \(blocks\)"),
        ("naclip", {"sigma": 0.0}, "sigma is 0.0; wanted more than 0 patches, or None"),
        ("gem", {"blocks": 4}, "blocks is 4; this CLIP has 3, so 1 to 3 go"),
    ],
)
def test_what_does_not_go_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_out(small_clip().visual, torch.zeros(1, 3, 32, 32), name, **options)
    with pytest.raises(ValueError, match="not a vision transformer with a class token, an"):
        read_out(small_clip(pool_type="avg").visual, torch.zeros(1, 3, 32, 32), "naclip")


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_dense_clip_and_a_decoder_that_starts_as_it_read_the_same(name: Any) -> None:
    dense = build_model(replace(DENSE_CLIP, clip="small", image_size=(32, 32), readout=name), small_clip())
    images, text = torch.randn(2, 3, 24, 40), F.normalize(torch.randn(5, 32), dim=-1)
    for ours, expected in zip(dense.encoder(images), read_out(dense.encoder.visual, images, name), strict=True):
        assert_close(ours, expected, atol=2e-3, rtol=0)  # the encoder has a norm more
    bare = {"prompt_tokens": 0, "spectral_layers": (), "class_embedding_twice": False, "readout": name}
    start = build_model(ModelConfig(**{**SMALL, **bare, "selection": False, "start": "dense_clip"}), small_clip())
    logits = start.eval()(images, text)
    assert torch.equal(logits.argmax(dim=1), dense(images, text).argmax(dim=1))


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in ("plain", "gem")])
@pytest.mark.parametrize("spectral_layers", [(0, 2), ()])
def test_prompts_are_trained_through_read_outs(name: Any, spectral_layers: tuple[int, ...]) -> None:
    """Prompts of the last block are tokens that patches may attend to; values and gradients are the plain twin's."""
    config: Any = {**SMALL, "prompt_tokens": 3, "readout": name, "spectral_layers": spectral_layers}
    model: Any = build_model(ModelConfig(**config), away_from_zeros(small_clip())).eval()
    trained = {name: value for name, value in model.encoder.named_parameters() if value.requires_grad}
    for parameter in trained.values():
        nn.init.normal_(parameter, std=0.2)
    images = torch.randn(2, 3, 24, 40)
    both = model.encoder(images), plain.encode(model.encoder, images)
    ours, theirs = (torch.cat([patches.flatten(1), image], dim=1) for patches, image in both)
    assert_close(ours, theirs, atol=1e-5, rtol=0)
    cotangent = torch.randn_like(ours)
    gradients = [torch.autograd.grad(value, [*trained.values()], cotangent) for value in (ours, theirs)]
    for parameter, gradient, expected in zip(trained, *gradients, strict=True):
        assert (gradient - expected).norm() < 1e-3 * expected.norm(), parameter
    patches = model.encoder(images)[0].square().mean(dim=(0, 2, 3))[0]
    prompts = torch.autograd.grad(patches, model.encoder.prompts)[0].flatten(1).any(dim=1)
    assert prompts.tolist() == [True, True, name != "maskclip"], "MaskCLIP's patches see themselves only"


def test_without_a_trained_model_a_clip_is_read_by_naclip_but_the_tiny_one_plainly() -> None:
    assert Which(clip="ViT-S-32", clip_weights="none").load().config.readout == "naclip"
    assert Which(clip="ViT-S-32", clip_weights="none", readout="plain").load().config.readout == "plain"
    assert Which(model="untrained", clip="ViT-S-32", clip_weights="none").load().config.readout == "plain"
    assert Which(clip="tiny").load().config == Which(model="dense-clip").load().config == DENSE_CLIP
    assert Which(model="dense-clip", readout="gem").load().encoder.readout == "gem"
    assert sptseg.load_model("dense-clip", small_clip()).config.readout == "naclip"
    with pytest.raises(ValueError, match="--readout sclip goes with --model dense-clip, training-free or untrained"):
        Which(readout="sclip").load()


@pytest.mark.parametrize("name", [*OPTIONS, "trained"])
def test_bf16_gives_the_labels_of_float32(name: Any) -> None:
    if name == "trained":
        model = sptseg.load_model()
    else:
        model = build_model(replace(DENSE_CLIP, readout=name), load_clip()).eval()
    names, narrow = sptseg.scenes.CLASSES, at_precision(model, "bf16")
    pictures = [sptseg.scenes.draw(seed)[0] for seed in range(6)]
    wide, short = ([segment(each, picture, names).labels for picture in pictures] for each in (model, narrow))
    assert (np.stack(wide) == np.stack(short)).mean() >= (0.995 if name == "trained" else 0.98)
