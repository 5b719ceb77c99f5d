"""What is trained and what is not, any size, dense CLIP as a start, and which CLIP models are refused."""

from typing import Any

import plain
import pytest
import torch
import torch.nn.functional as F
from conftest import small_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.model import _build_vision_tower
from torch import Tensor, nn
from torch.testing import assert_close

from sptseg.model.clip import Clip
from sptseg.model.config import ModelConfig
from sptseg.model.decoder import START_THRESHOLD
from sptseg.model.spt_seg import SptSeg, build_model
from sptseg.model.towers import run_block

SMALL = {"clip": "small", "image_size": (32, 32), "prompt_tokens": 3, "dropout": 0.0}
BARE = {"prompt_tokens": 0, "spectral_layers": (), "class_embedding_twice": False}
PLAIN_CLIP = small_clip()  # where a test neither trains nor changes it


def new_model(clip: Clip = PLAIN_CLIP, **changes: object) -> SptSeg:
    return build_model(ModelConfig(**{**SMALL, **changes}), clip)


def text_of(classes: int) -> Tensor:
    return F.normalize(torch.randn(classes, 32), dim=-1)


@torch.no_grad()
def select_tokens(model: SptSeg) -> None:
    """Points every layer's selection vector roughly at its tokens, which lie close together in so small a model."""
    tokens = model.encoder(torch.randn(2, 3, 32, 32))[0].flatten(2).transpose(1, 2)
    layer: Any
    for layer in model.decoder.layers:
        if getattr(layer, "selection_vector", None) is not None:
            mean = F.normalize(layer.attention(tokens, (8, 8)).mean(dim=(0, 1)), dim=-1)
            layer.selection_vector.copy_(mean + 0.05 * torch.randn(32))


def test_clip_stays_in_evaluation_mode() -> None:
    model = new_model(dropout=0.1).train()
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert dropouts and all(module.training for module in dropouts)
    assert not any(module.training for module in model.encoder.visual.modules())
    assert not any(parameter.requires_grad for parameter in model.clip.model.parameters())
    assert not any(module.training for module in model.eval().modules())


@settings(max_examples=10, deadline=None)
@given(
    st.tuples(st.integers(1, 7), st.integers(1, 7)), st.integers(1, 5), st.sampled_from(["spectral", "cross_attention"])
)
@torch.no_grad()
def test_any_grid_and_any_number_of_classes(grid: tuple[int, int], classes: int, decoder: str) -> None:
    model = new_model(decoder=decoder).eval()
    images, text = torch.randn(2, 3, 4 * grid[0], 4 * grid[1]), text_of(classes)
    patches, image = model.encoder(images)
    logits = model(images, text)
    assert patches.shape == (2, 32, *grid) and image.shape == (2, 32) and logits.shape == (2, classes, *grid)
    assert_close(patches.norm(dim=1), torch.ones(2, *grid))
    assert_close(image.norm(dim=1), torch.ones(2))
    order = torch.randperm(classes)  # classes do not see each other, nor do images
    assert_close(model(images, text[order]), logits[:, order], atol=1e-5, rtol=1e-4)
    assert_close(model(images[1:], text[:1]), logits[1:, :1], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="images are 32 x 30; both sides must be multiples of the patch size 4 x 4"):
        model(torch.zeros(1, 3, 32, 30), text)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(("decoder", "selection"), [("spectral", True), ("spectral", False), ("cross_attention", True)])
@torch.no_grad()
def test_a_dense_start_is_dense_clip(decoder: str, selection: bool, layers: int) -> None:
    """However many layers: cosines of patch and text, shifted and scaled, so the same class at every pixel."""
    model = new_model(**BARE, decoder=decoder, selection=selection, decoder_layers=layers, start="dense_clip").eval()
    images, text = torch.randn(2, 3, 32, 32), text_of(5)
    patches, _ = model.encoder(images)
    cosine = torch.einsum("behw,ce->bchw", patches, text)
    logits = model(images, text)
    scale = model.clip.model.logit_scale.exp()
    assert_close(logits, scale * (cosine - START_THRESHOLD), atol=1e-3, rtol=1e-4)
    dense = new_model(**BARE, decoder="none").eval()(images, text)
    assert_close(dense.sigmoid(), (scale * cosine).softmax(dim=1), atol=2e-4, rtol=0)
    for found in (logits, dense):  # rounding may swap equals
        assert_close(cosine.gather(1, found.argmax(1, keepdim=True))[:, 0], cosine.amax(1), atol=1e-5, rtol=0)


def test_each_switch_of_a_dense_start_stands_alone() -> None:
    """They leave the other weights as released."""

    def seeded(**switches: object) -> Any:
        torch.manual_seed(0)
        return new_model(**switches).decoder.eval()

    released, text, image = seeded(), text_of(4), torch.randn(2, 32)
    first_weights = seeded(start="dense_clip", residual=False, norms="layer", logit_scale=False)
    assert_close(first_weights.queries(image, text), text.expand(2, -1, -1))
    assert first_weights.log_scale is None and torch.equal(first_weights.layers[0].top_down, torch.eye(32))
    for switch, part in (({"residual": True}, "top_down"), ({"norms": "rms"}, "norm"), ({"logit_scale": True}, "")):
        own = seeded(**switch).state_dict()
        other = {n for n, v in released.state_dict().items() if n not in own or not torch.equal(own[n], v)}
        assert bool(other) == bool(part) and all(part in name for name in other), (switch, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": "unet"}, "decoder is 'unet'; wanted one of spectral, cross_attention, none"),
        ({"readout": "gem"}, "readout gem goes without prompts"),
        ({"spectral_band": (0.3, 0.3)}, r"spectral_band is \(0.3, 0.3\); wanted the lower frequency first"),
        ({"decoder": "cross_attention", "residual": True}, "residual and branches are of the spectral decoder"),
        ({"decoder_layers": 0}, "decoder_layers is 0; wanted 1 to 100"),
        ({"dropout": 1.0}, "dropout is 1.0; wanted 0 <= dropout < 1"),
        ({"templates": ("a photo",)}, "wanted one or more texts with one {} each"),
        ({"templates": ("a {}", 1)}, r"templates is \('a {}', 1\); wanted tuple\[str, ...\]"),
        ({"image_size": (32, 30)}, r"image_size is \(32, 30\); small needs multiples of its patch size \(4, 4\)"),
        ({"prompt_depth": 3}, "prompt_depth is 3; this CLIP has 3 blocks, so 0 to 2 go"),
        ({"spectral_layers": (0, 3)}, r"spectral_layers is \(0, 3\); this CLIP has the blocks 0 to 2"),
        ({"decoder_heads": 5}, "the embedding width 32 is no multiple of decoder_heads 5"),
        ({"decoder_heads": 1}, "needs at least 2 heads, one for each branch, got 1"),
    ],
)  # fmt: skip
def test_wrong_configurations_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_model(**changes)
    new_model(dropout=0, seen_offset=0)  # whole numbers are numbers


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("layer_scale", [None, 0.5])
@pytest.mark.parametrize("tokens", [1, 17, 520])  # the last: one head after the other
def test_run_block_equals_the_block(tokens: int, layer_scale: float | None, quick_gelu: bool) -> None:
    vision = {"image_size": 8, "patch_size": 4, "width": 24, "layers": 1, "head_width": 8, "ls_init_value": layer_scale}
    block: Any = _build_vision_tower(16, vision, quick_gelu).get_submodule("transformer.resblocks.0")
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = torch.randn(2, tokens, 24, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    value, expected = run_block(block, ours), block(theirs)
    assert_close(value, expected, atol=1e-5, rtol=1e-5)
    cotangent = torch.randn_like(value)
    both = ((value, ours), (expected, theirs))
    own, wanted = (torch.autograd.grad(y, [x, *block.parameters()], cotangent) for y, x in both)
    assert_close(own, wanted, atol=2e-3, rtol=1e-4)
    with torch.no_grad():
        assert_close(run_block(block, ours), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_torch_compile_gets_one_graph_for_any_batch_and_number_of_classes() -> None:
    model = new_model().eval()
    traced: Any = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for stance, batch, classes in (("default", 2, 7), ("fail_on_recompile", 5, 9)):
        images, text = torch.randn(batch, 3, 40, 48), text_of(classes)
        with torch.no_grad(), torch.compiler.set_stance(stance):
            assert_close(traced(images, text), model(images, text), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (24, 56)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prompt_depth": 1, "spectral_layers": (0, 2), "decoder_window": 2, "decoder_layers": 2},
        {"prompt_tokens": 0, "class_embedding_twice": False},
        {"prompt_tokens": 600, "spectral_layers": (0, 1, 2)},
        {"start": "dense_clip", "selection": False},
        {"start": "dense_clip", "prompt_depth": 0, "spectral_layers": ()},
        {"residual": True, "branches": "high", "spectral_band": (0.1, 0.3)},
        {"norms": "rms", "branches": "low", "spectral_band": (0.0, 0.25)},
        {"logit_scale": True, "branches": "full", "spectral_band": (0.25, 1.0), "spectral_trained": False},
        {"start": "dense_clip", "residual": False, "norms": "layer", "logit_scale": False},
        {"spectral_layers": (), "decoder": "cross_attention", "logit_scale": True},
        {"spectral_layers": (), "decoder": "cross_attention"},
        {"spectral_layers": (0, 2), "readout": "maskclip"},
        {"readout": "sclip"},
        {"spectral_layers": (), "readout": "clearclip"},
        {"spectral_layers": (0, 2), "readout": "naclip"},
        {"spectral_layers": (), "decoder": "cross_attention", "start": "dense_clip"},
    ],
    ids=lambda changes: ",".join(changes) or "released",
)
def test_the_model_equals_its_plain_twin_in_value_and_gradient(changes: dict[str, Any], size: tuple[int, int]) -> None:
    """Every trained parameter gets one, each block's prompts, each part of a filter; checkpointing changes none."""
    model = new_model(**changes).eval()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    given = {"encoder.spectral_prompt.weight"} if "spectral_trained" in changes else set()
    assert set(model.trained_state()) - set(trained) == given
    for parameter in trained.values():
        nn.init.normal_(parameter, std=0.2)  # away from zeros and ones, which hide what is left out
    if model.config.selection and model.config.decoder == "spectral":
        select_tokens(model)
    images, text = torch.randn(2, 3, *size), text_of(4)
    ours, theirs = model(images, text), plain.mask_logits(model, images, text)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.detach().abs().max()))
    cotangent = torch.randn_like(ours)
    model.train().encoder.checkpointing = True
    outputs = ours, theirs, model(images, text)
    gradients = (torch.autograd.grad(logits, [*trained.values()], cotangent) for logits in outputs)
    for name, gradient, expected, recomputed in zip(trained, *gradients, strict=True):
        assert_close(recomputed, gradient, msg=name)
        zero = 1e-7 * cotangent.norm()  # keys' biases have no gradient but what rounding leaves
        assert (gradient - expected).norm() < 1e-3 * expected.norm() + zero, name
        if name == "encoder.prompts":
            assert gradient.flatten(1).any(dim=1).all()
        elif name == "encoder.spectral_prompt.weight" and changes.get("spectral_band") is None:
            assert gradient[..., 0].all() and gradient[:, 1:-1, :, 1].all()
        assert gradient.any() or name.endswith("key.bias"), name
