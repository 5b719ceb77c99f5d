"""Image towers that others built: with small random weights they say what open_clip's own code says."""

from __future__ import annotations

from functools import partial
from typing import Any

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import WORDS, small_clip
from open_clip.model import _build_vision_tower
from torch import Tensor
from torch.testing import assert_close

from sptseg.cli import which
from sptseg.datasets import Note
from sptseg.model import towers
from sptseg.model.clip import Clip
from sptseg.model.config import DENSE_CLIP, ModelConfig
from sptseg.model.encoder import PromptedEncoder
from sptseg.model.ops import grid_to_tokens
from sptseg.model.readouts import OPTIONS, default_readout, gaussian, read_out
from sptseg.model.spt_seg import build_model
from sptseg.model.towers import tower

GRID = (4, 6)
SIDES = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8, "img_size": (32, 48)}
SMALL = {  # open_clip's configurations, each with another tower, and what of it is small
    "ViT-B-16-SigLIP": SIDES, "ViT-gopt-16-SigLIP2-256": SIDES, "PE-Core-B-16": SIDES, "PE-Core-bigG-14-448": SIDES,
    "EVA01-g-14": SIDES, "EVA02-B-16": SIDES, "EVA02-E-14": SIDES, "MobileCLIP2-L-14": SIDES,
    "MobileCLIP-B": {"depth": 2, "img_size": (64, 96)},
    "ViT-L-14-CLIPA": {"width": 32, "layers": 3, "head_width": 16, "patch_size": 8, "image_size": (32, 48)},
}  # fmt: skip
SIGLIP = "ViT-B-16-SigLIP"


@pytest.fixture(params=SMALL)
def visual(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    return small_tower(request.param, monkeypatch)


def small_tower(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tower of an open_clip configuration, small; random weights away from zeros and ones."""
    config: Any = open_clip.get_model_config(name)
    vision, sizes = config["vision_cfg"], SMALL[name]
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
        assert_close(image, expected, atol=1e-4, rtol=1e-4)
        if name == "plain":
            assert_close(grid_to_tokens(patches), alone(visual, seen[0]), atol=1e-4, rtol=1e-4)
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
    assert_close(grid_to_tokens(read_out(visual, images, "naclip")[0]), expected, atol=1e-4, rtol=1e-4)


def test_prompts_go_without_a_place(visual: Any) -> None:
    """As keys and values only, or as tokens of timm's own block, which gives those at the front no rotary position."""
    images = pictures(visual)
    encoder = PromptedEncoder(visual, ModelConfig(prompt_tokens=3, prompt_depth=1, spectral_layers=())).eval()
    with_prompts = list(encoder.states(images))
    for ours, theirs in zip(with_prompts, encoder.states(images, of_prompts=False), strict=True):
        assert_close(ours[:, -24:], theirs[:, -24:], atol=1e-4, rtol=1e-4)
    parts, first = encoder.tower, with_prompts[-1].shape[1] - 24
    block: Any = parts.blocks[0]
    if parts.rotary is not None:
        block.attn.num_prefix_tokens = first + 3
        tokens, prompts = encoder.embed(images), encoder.prompt_projection(encoder.prompts)[0].expand(2, -1, -1)
        x = torch.cat([tokens[:, :first], prompts, tokens[:, first:]], dim=1)
        assert_close(block(x, rope=parts.rotary.pos_embed), with_prompts[0], atol=1e-4, rtol=1e-4)
    encoder(images)[0].sum().backward()
    assert encoder.prompts is not None and encoder.prompts.grad is not None and encoder.prompts.grad.abs().sum() > 0


def test_models_of_towers_without_class_token(monkeypatch: pytest.MonkeyPatch) -> None:
    visual, small = small_tower(SIGLIP, monkeypatch), small_clip()
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


def test_windows_of_the_command_line_are_multiples_of_the_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(which, "load_clip", lambda *_: small_clip(image_size=28, patch_size=14))
    with pytest.warns(Note, match="small: it sees windows of 518 x 518 pixels: 512 is no multiple of its patch size"):
        model = which.Which(clip="small", clip_weights="none").load()
    assert (model.config.image_size, model.config.normalization) == ((518, 518), "clip")


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
