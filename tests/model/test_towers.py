"""Image towers and their read-outs say what open_clip's code, the published tensors and plain twins say."""

import ast
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import open_clip
import plain
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import REFERENCE, WORDS, small_clip
from open_clip.model import _build_vision_tower
from safetensors import safe_open
from torch import Tensor, nn
from torch.testing import assert_close

import sptseg
from sptseg.cli import which
from sptseg.cli.which import Which
from sptseg.datasets import Note
from sptseg.inference import at_precision, segment
from sptseg.model import DENSE_CLIP, ModelConfig, build_model, readouts, towers
from sptseg.model.clip import Clip, load_clip
from sptseg.model.encoder import PromptedEncoder
from sptseg.model.ops import grid_to_tokens
from sptseg.model.readouts import OPTIONS, default_readout, gaussian, read_out
from sptseg.model.towers import embed, tower

GRID = (4, 6)
SIDES = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8, "img_size": (32, 48)}
SMALL = {  # open_clip's configurations, each with another tower, and what of it is small
    "ViT-B-16-SigLIP": SIDES, "ViT-gopt-16-SigLIP2-256": SIDES, "PE-Core-B-16": SIDES, "PE-Core-bigG-14-448": SIDES,
    "EVA01-g-14": SIDES, "EVA02-B-16": SIDES, "EVA02-E-14": SIDES, "MobileCLIP2-L-14": SIDES,
    "MobileCLIP-B": {"depth": 2, "img_size": (64, 96)},
    "ViT-L-14-CLIPA": {"width": 32, "layers": 3, "head_width": 16, "patch_size": 8, "image_size": (32, 48)},
}  # fmt: skip
SIGLIP = "ViT-B-16-SigLIP"
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(params=SMALL)
def visual(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tower of an open_clip configuration, small; random weights away from zeros and ones."""
    config: Any = open_clip.get_model_config(request.param)
    vision, sizes = config["vision_cfg"], SMALL[request.param]
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, **sizes))
    visual = _build_vision_tower(32, vision if "timm_model_name" in vision else {**vision, **sizes}).eval()
    for parameter in visual.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter) / max(1, parameter.shape[-1] / 32) ** 0.5
    return visual.requires_grad_(False)


def pictures(visual: Any) -> Tensor:
    height, width = tower(visual).patch_size
    return torch.randn(2, 3, GRID[0] * height, GRID[1] * width)


def alone(visual: Any, tokens: Tensor) -> Tensor:
    """Unit embeddings (B, N, E) of tokens (B, N, D) after the last block, by open_clip's own pool of each alone."""
    if hasattr(visual, "trunk"):
        each = [visual.head(visual.trunk.forward_head(x[:, None])) for x in visual.trunk.norm(tokens).unbind(1)]
        return F.normalize(torch.stack(each, dim=1), dim=-1)
    return F.normalize(visual.ln_post(tokens) @ visual.proj, dim=-1)


def test_embeddings_are_open_clips_own(visual: Any) -> None:
    """Of the picture by every read-out, and of patches by the plain one: on a grid that is not square."""
    images, parts, seen = pictures(visual), tower(visual), []
    parts.blocks[-1].register_forward_hook(lambda *given: seen.append(given[-1][:, -24:]))
    expected = F.normalize(visual(images), dim=-1)
    for name in OPTIONS:
        patches, image = read_out(visual, images, name)
        assert patches.shape == (2, parts.output_dim, *GRID)
        assert_close(image, expected, **CLOSE)
        if name == "plain":
            assert_close(grid_to_tokens(patches), alone(visual, seen[0]), **CLOSE)
    taller = torch.cat([images, images[:, :, -tower(visual).patch_size[0] :]], dim=2)
    assert read_out(visual, taller, "plain")[0].shape == (2, parts.output_dim, 5, 6)


def test_naclip_by_hand(visual: Any) -> None:
    """With and without a class token, of keys with rotary positions where there are any."""
    images, parts = pictures(visual), tower(visual)
    x, rotation = towers.embed(visual, images), parts.rotation(GRID)
    first = x.shape[1] - 24
    assert first == (parts.class_token is not None)
    for block in parts.blocks[:-1]:
        x = towers.run_block(block, x, rotation=rotation)
    _, key, value = towers.project(parts.blocks[-1], x, rotation=rotation)
    near = gaussian(GRID, 5.0, torch.device("cpu"), torch.float32)[1:, 1:]
    weights = key[:, :, first:] @ key.mT / key.shape[-1] ** 0.5
    weights[..., first:] += near
    expected = alone(visual, towers.attention_output(parts.blocks[-1], weights.softmax(-1) @ value))
    assert_close(grid_to_tokens(read_out(visual, images, "naclip")[0]), expected, **CLOSE)


def test_prompts_go_without_a_place(visual: Any) -> None:
    """As keys and values only, or as tokens of timm's own block, which gives those at the front no rotary position."""
    images = pictures(visual)
    encoder: Any = PromptedEncoder(visual, ModelConfig(prompt_tokens=3, prompt_depth=1, spectral_layers=())).eval()
    with_prompts = list(encoder.states(images))
    for ours, theirs in zip(with_prompts, encoder.states(images, of_prompts=False), strict=True):
        assert_close(ours[:, -24:], theirs[:, -24:], **CLOSE)
    parts, first = encoder.tower, with_prompts[-1].shape[1] - 24
    if parts.rotary is not None:
        block: Any = parts.blocks[0]
        block.attn.num_prefix_tokens = first + 3
        tokens, prompts = encoder.embed(images), encoder.prompt_projection(encoder.prompts)[0].expand(2, -1, -1)
        x = torch.cat([tokens[:, :first], prompts, tokens[:, first:]], dim=1)
        assert_close(block(x, rope=parts.rotary.pos_embed), with_prompts[0], **CLOSE)
    assert torch.autograd.grad(encoder(images)[0].sum(), encoder.prompts)[0].any()


@pytest.mark.parametrize("visual", [SIGLIP], indirect=True)
def test_models_of_towers_without_class_token(visual: Any) -> None:
    small = small_clip()
    small.model.visual = visual
    clip = Clip(SIGLIP, None, small.model, small.tokenizer)
    changes: Any = {"clip": SIGLIP, "image_size": (32, 48), "normalization": "clip"}
    images, text = pictures(visual), clip.class_embeddings(WORDS[:3])
    dense = build_model(ModelConfig(**{**vars(DENSE_CLIP), **changes}), clip).eval()
    assert dense(images, text).shape == (2, 3, *GRID)
    trained = build_model(ModelConfig(spectral_layers=(), prompt_tokens=2, readout="naclip", **changes), clip)
    assert trained.train()(images, text).shape == (2, 3, *GRID)
    with pytest.raises(ValueError, match="spectral_layers is .* no class token.* wanted \\(\\)"):
        build_model(ModelConfig(**changes), clip)
    with pytest.raises(ValueError, match=r"imagenet, but ViT-B-16-SigLIP was trained .* mean \(0.5, 0.5, 0.5\); set"):
        build_model(ModelConfig(**{**changes, "normalization": "imagenet"}), clip)


def test_which_models_with_public_weights_are_usable() -> None:
    """By configuration alone, and each tower that is called usable has the parts: built without memory."""
    public = {name for name, _ in open_clip.list_pretrained()}
    usable = public & set(towers.usable_models())
    assert (len(public), len(usable)) == (115, 76) or open_clip.__version__ != "3.3.0"
    others = ("RN", "convnext", "ViTamin", "coca", "MobileCLIP-S", "MobileCLIP2-S")  # no transformer, or another
    assert public - usable == {name for name in public if name.startswith(others)}
    config: Any = open_clip.get_model_config("ViT-B-32")
    for other in ({"layers": (1, 1)}, {"pool_type": "avg"}, {"qk_norm": True}, {"timm_model_name": "x"}):
        assert not towers.usable_config({**config, "vision_cfg": {**config["vision_cfg"], **other}}), other
    configs: dict[str, Any] = {name: open_clip.get_model_config(name) for name in sorted(usable)}
    for name in {repr(config["vision_cfg"]): name for name, config in configs.items()}.values():
        with torch.device("meta"):
            visual = _build_vision_tower(configs[name]["embed_dim"], configs[name]["vision_cfg"])
        towers.check_visual(name, visual)
        assert tower(visual).output_dim == configs[name]["embed_dim"], name
        assert default_readout(name) == ("plain" if tower(visual).pool not in ("token", "mean") else "naclip")


KEYS = {  # of the reference set
    "vanilla": ("plain", {}), "maskclip": ("maskclip", {}), "maskclip_bare": ("maskclip", {"bare": True}),
    "sclip": ("sclip", {}), "sclip_bare": ("sclip", {"bare": True}), "clearclip": ("clearclip", {}),
    "naclip": ("naclip", {}), "naclip_std2": ("naclip", {"sigma": 2.0}),
    "naclip_vanilla": ("naclip", {"bare": False}), "kk_reduced": ("naclip", {"sigma": None}),
    "gem_depth3": ("gem", {"blocks": 2}),
}  # fmt: skip
TOY = {"clip": "small", "image_size": (32, 32), "dropout": 0.0}


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
    ("name", "options"), [*KEYS.values(), ("clearclip", {"bare": False}), ("gem", {}), ("gem", {"blocks": 1})], ids=str
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
    start = build_model(ModelConfig(**{**TOY, **bare, "selection": False, "start": "dense_clip"}), small_clip())
    labels, expected = start.eval()(images, text).argmax(dim=1), dense(images, text)
    best, second = expected.topk(2, dim=1).values.unbind(dim=1)
    clear = best - second > 1e-3  # where two classes are equal to rounding, another processor decides otherwise
    assert clear.float().mean() > 0.9 and torch.equal(labels[clear], expected.argmax(dim=1)[clear])


def test_read_outs_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Which(clip="ViT-S-32", clip_weights="none").load().config.readout == "naclip"
    assert Which(clip="ViT-S-32", clip_weights="none", readout="plain").load().config.readout == "plain"
    assert Which(model="untrained", clip="ViT-S-32", clip_weights="none").load().config.readout == "plain"
    assert Which(clip="tiny").load().config == Which(model="dense-clip").load().config == DENSE_CLIP
    assert Which(model="dense-clip", readout="gem").load().encoder.readout == "gem"
    assert sptseg.load_model("dense-clip", small_clip()).config.readout == "naclip"
    with pytest.raises(ValueError, match="--readout sclip goes with --model dense-clip, training-free or untrained"):
        Which(readout="sclip").load()
    monkeypatch.setattr(which, "load_clip", lambda *_: small_clip(image_size=28, patch_size=14))
    with pytest.warns(Note, match="small: it sees windows of 518 x 518 pixels: 512 is no multiple of its patch size"):
        assert Which(clip="small", clip_weights="none").load().config.image_size == (518, 518)


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
