"""Checkpoints of the research code are read as data only; what no forward pass reads is left out by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import Reference, load_reference
from safetensors.torch import save_file
from test_checkpoints import logits
from torch import Tensor
from torch.testing import assert_close

from sptseg.checkpoints.checkpoint import load_model, save_model
from sptseg.checkpoints.research import import_research, import_research_checkpoint


def sizes(reference: Reference) -> dict[str, int]:
    return {key: reference.config[key] for key in ("image_size", "heads", "decoder_heads")}


@pytest.fixture
def text_tower() -> open_clip.CLIP:
    """A narrow text tower with CLIP's own vocabulary."""
    text = {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 2}
    vision = {"image_size": 8, "patch_size": 4, "width": 16, "layers": 1, "head_width": 16}
    return open_clip.CLIP(32, vision, text, quick_gelu=True).eval()


def text_state(tower: open_clip.CLIP) -> dict[str, Tensor]:
    own = {name: value for name, value in tower.state_dict().items() if not name.startswith("visual.")}
    return {f"text_encoder.{name}": value for name, value in own.items() if name != "logit_scale"}


def test_a_pth_file_with_a_text_encoder(text_tower: open_clip.CLIP, tmp_path: Path) -> None:
    """As mmseg writes them. The text encoder is read, what no forward pass reads is named."""
    reference = load_reference("zegclip")
    state = {**reference.state, **text_state(text_tower), "decode_head.conv_seg.bias": torch.zeros(2)}
    meta = {"epoch": 3, "iter": 20000, "CLASSES": ("cow", "sky"), "PALETTE": [[1, 2, 3]], "hook_msgs": {}}
    torch.save({"state_dict": state, "meta": meta, "optimizer": {"state": {}}}, tmp_path / "zegclip.pth")
    imported = import_research(tmp_path / "zegclip.pth", **sizes(reference))
    assert torch.equal(logits(imported.model, 128), logits(reference.imported.model, 128))
    names = ["cow", "playing field"]
    tokens = open_clip.SimpleTokenizer(context_length=16)([f"a photo of a {name}" for name in names])
    expected = F.normalize(text_tower.encode_text(tokens), dim=-1)
    assert_close(imported.model.class_embeddings(names), expected.detach())
    assert set(imported.left_out) == {*reference.imported.left_out, "decode_head.conv_seg.bias"}
    report = imported.report()
    assert report.startswith("ZegCLIP checkpoint, 3 prompt tokens, with a text encoder; left out")
    assert all(f"  {name}" in report.splitlines() for name in imported.left_out)
    path = save_model(imported.model, tmp_path / "ours.safetensors")
    assert torch.equal(load_model(path).class_embeddings(names), imported.model.class_embeddings(names))


def test_an_import_logs_what_it_left_out(reference: Reference, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="sptseg"):
        import_research_checkpoint(reference.state, **sizes(reference))
    assert [(record.name, record.levelname) for record in caplog.records] == [("sptseg", "INFO")]
    assert caplog.messages == [reference.imported.report()]


@pytest.mark.parametrize("form", ["wrapped.pth", "flat.bin", "flat.SAFETENSORS", "a mapping"])
def test_forms_prefixes_and_half_precision(form: str, reference: Reference, tmp_path: Path) -> None:
    state: Any = {f"module.{name}": value for name, value in reference.state.items()}
    source: Any = {"state_dict": state} if form == "wrapped.pth" else state
    if form.endswith("SAFETENSORS"):
        save_file(source, tmp_path / form)
    else:
        torch.save(source, tmp_path / form)
    model = import_research_checkpoint(source if form == "a mapping" else str(tmp_path / form), **sizes(reference))
    assert torch.equal(logits(model, 128), logits(reference.imported.model, 128))
    half = import_research_checkpoint({name: value.half() for name, value in state.items()}, **sizes(reference))
    assert logits(half, 128).dtype == torch.float32


def without(*names: str) -> Callable[[dict], dict]:
    return lambda state: {name: value for name, value in state.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (without("backbone.conv1.weight"), {}, "no whole one of .* research code.*conv1.weight"),
        (without("decode_head.q_proj.bias"), {}, "no whole one .*decoder.query_map.bias"),
        (without("backbone.complex_weight", "backbone.prompt_norm.bias"), {}, "no whole one .*prompt_norm.bias"),
        (lambda state: {**state, "text_encoder.ln_final.bias": torch.zeros(8)}, {}, "no whole one .*token_embedding"),
        (without("backbone.transformer.resblocks.1.ln_1.bias"), {}, "no whole one .*resblocks.1.ln_1.bias"),
        (dict, {"image_size": 64}, "does not go with image_size .64, 64., heads 4 .*encoder.spectral_prompt.weight"),
        (dict, {"heads": 5}, "heads 5 .*divisible"),
        (dict, {"decoder_heads": 4}, "decoder_heads 4: .*size mismatch"),
        (lambda state: {**state, "backbone.prompt_embeddings": torch.zeros(3)}, {}, "no whole one"),
    ],
)
def test_research_checkpoints_that_do_not_fit_are_refused(change: Callable, options: dict, message: str) -> None:
    reference = load_reference("spt")
    with pytest.raises(ValueError, match=message) as refusal:
        import_research_checkpoint(change(reference.state), **{**sizes(reference), **options})
    assert "\n" not in str(refusal.value)
