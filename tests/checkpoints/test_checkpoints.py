"""Checkpoints come back bit for bit; broken and hostile ones are refused by name, in little memory."""

import json
import math
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import WORDS, Reference, load_reference, small_clip
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from torch.testing import assert_close

from sptseg.checkpoints import import_report, import_research_checkpoint
from sptseg.checkpoints.checkpoint import checksum, completed, load_model, read_header, save_model
from sptseg.model import Clip, ModelConfig, SptSeg, build_model, fingerprint

CONFIG = ModelConfig(clip="small", image_size=(32, 32), prompt_tokens=3, templates=("a photo of a {}", "a {}"))


@pytest.fixture
def saved(clip: Clip, tmp_path: Path) -> tuple[SptSeg, Path]:
    model = build_model(CONFIG, clip).eval()
    return model, save_model(model, tmp_path / "model.safetensors")


def logits(model: SptSeg, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    width = model.encoder.visual.output_dim
    text = F.normalize(torch.randn(4, width, generator=generator), dim=-1)
    with torch.no_grad():
        return model(torch.randn(2, 3, size, size, generator=generator), text)


def rewritten(path: Path, change: Callable[[dict, dict], object]) -> Path:
    """The checkpoint with its header and tensors changed, as a stranger could write it."""
    header, tensors = read_header(path), load_file(path)
    change(header, tensors)
    header["sha256"] = checksum(tensors)
    save_file(tensors, path, metadata={"sptseg": json.dumps(header)})
    return path


KINDS: list[dict[str, Any]] = [
    {}, {"decoder": "cross_attention", "loss": "zegclip", "spectral_layers": ()},
    {"start": "dense_clip", "selection": False, "prompt_tokens": 0},
    {"decoder": "none", "prompt_tokens": 0, "spectral_layers": ()},
]  # fmt: skip


@pytest.mark.parametrize("changes", KINDS)
def test_save_and_load_give_the_same_bits(changes: dict, clip: Clip, tmp_path: Path) -> None:
    config = ModelConfig(**{"clip": "small", "image_size": (24, 40), **changes})
    model = build_model(config, clip).eval()
    path = save_model(model, tmp_path / "a" / "folder", {"seed": 3})
    assert [path] == [*tmp_path.glob("a/folder/*")] == [tmp_path / "a" / "folder" / "model.safetensors"]
    loaded = load_model(path.parent, clip)
    assert loaded.config == config and not loaded.training and loaded.about["seed"] == 3
    assert torch.equal(logits(loaded), logits(model))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained <= load_file(path).keys() == model.trained_state().keys(), "and nothing else is in the file"
    older = {"prompt_tokens": 3, "decoder": "spectral", "bicubic": False}
    assert completed({"prompt_tokens": 3}).items() >= older.items(), "as an older file has it"


def test_imported_models_bring_their_clip_along(tmp_path: Path) -> None:
    model = load_reference("spt").imported
    halved = load_model(save_model(model, tmp_path / "half.safetensors", half=True)).trained_state()
    assert all(torch.equal(value, model.trained_state()[name].half().float()) for name, value in halved.items())
    loaded = load_model(save_model(model, tmp_path / "imported.safetensors"))
    assert loaded.config == model.config and torch.equal(logits(loaded, 128), logits(model, 128))
    assert fingerprint(loaded.clip) == fingerprint(model.clip)
    with pytest.raises(ValueError, match="without a text encoder; call it with text embeddings"):
        loaded.class_embeddings(["tree"])


def test_a_file_is_found_by_any_path(saved: tuple[SptSeg, Path], clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = saved
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("HOME", str(path.parent))
    upper = save_model(model, "~/M.SAFETENSORS")
    assert upper == path.parent / "M.SAFETENSORS" and upper.is_file()
    for source in ("model.safetensors", Path("model.safetensors"), ".", "~", path.parent, "~/M.SAFETENSORS", upper):
        assert torch.equal(logits(load_model(source, clip)), logits(model))
    save_model(model, "embedded")
    assert load_model("embedded").config.clip == "tiny", "its name is the embedded model's"
    assert load_model("./embedded", clip).config == load_model(Path("embedded"), clip).config == CONFIG


def changed_clip(name: str) -> Clip:
    """The small CLIP with one thing another."""
    clip = small_clip(**({"head_width": 8} if name == "heads" else {}))
    if "." in name or "_" in name:
        clip.model.state_dict()[name].view(-1)[0] += 1e-3
    if name == "activation":
        for block in [*clip.visual.transformer.resblocks, *clip.model.transformer.resblocks]:
            block.mlp.gelu = torch.nn.Sigmoid()
    if name == "words":
        clip = replace(clip, tokenizer=replace(clip.tokenizer, words=WORDS[::-1]))
    return clip


OTHER = "heads activation words visual.proj visual.transformer.resblocks.1.mlp.c_fc.bias logit_scale text_projection"


@pytest.mark.parametrize("name", [*OTHER.split(), "transformer.resblocks.0.ln_1.weight", "token_embedding.weight"])
def test_another_clip_is_refused_whatever_differs(name: str, saved: tuple[SptSeg, Path], clip: Clip) -> None:
    other = changed_clip(name)
    assert fingerprint(other) != fingerprint(clip) == fingerprint(replace(clip, name="x", weights="y.pt"))
    with pytest.raises(ValueError, match=r"was trained on another CLIP than this small with weights None"):
        load_model(saved[1], other)


def test_fingerprints_of_earlier_versions_count(saved: tuple[SptSeg, Path], clip: Clip) -> None:
    """They hold four tensors of the image tower and no activation; the name stands for that."""
    earlier = fingerprint(clip, like="0" * 16)
    assert len(earlier) == 16 and earlier != fingerprint(clip)[:16]
    path = rewritten(saved[1], lambda header, _: header.update(clip=earlier))
    load_model(path, clip)
    for other in (changed_clip("visual.proj"), replace(clip, name="small-quickgelu")):
        with pytest.raises(ValueError, match="was trained on another CLIP"):
            load_model(path, other)


HOSTILE: list[tuple[str, Any]] = [  # sizes that no memory holds, paths, other types, values out of range
    ("clip", "/etc/passwd"), ("clip", "hf-hub:someone/model"), ("clip", None), ("clip_weights", "/etc/passwd"),
    ("clip_weights", 1), *(("image_size", value) for value in ([10**9] * 2, [0, 0], [31, 32], [32], "32", [[32, 32]])),
    *(("prompt_tokens", value) for value in (4, 10**12, 1.5, None, True)), ("prompt_depth", 0), ("decoder_heads", 5),
    *(("spectral_layers", value) for value in ([-1], [0, 0], [[0]], list(range(2000)))), ("decoder_layers", 2),
    ("decoder_layers", 10**12), ("dropout", math.nan), ("colour", "red"),
    *(("templates", value) for value in ([], ["{} {}"], ["{0.__class__}"])),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), HOSTILE, ids=lambda value: repr(value)[:20])
def test_configurations_are_refused_by_file_and_field(name: str, value: Any, clip: Clip, tmp_path: Path) -> None:
    """In a moment and in little memory, whatever sizes they name, and no path in them is opened."""
    model = build_model(replace(CONFIG, clip="tiny"), clip)
    path = save_model(model, tmp_path / "model.safetensors")
    rewritten(path, lambda header, _: header["config"].update({name: value}))
    with pytest.raises(ValueError) as refusal:
        load_model(path, None if name.startswith("clip") else clip)
    said = str(refusal.value)
    of_tensors = {"prompt_tokens": "encoder.prompts", "prompt_depth": "encoder.prompts", "clip_weights": "CLIP"}
    assert str(path) in said and "\n" not in said
    assert name in said or of_tensors.get(name, "decoder.layers") in said


WRONG: list[tuple[str, Callable[[dict, dict], object]]] = [
    ("its format is 'sptseg-9', not 'sptseg-1'", lambda header, _: header.update(format="sptseg-9")),
    ("it lacks 'config'", lambda header, _: header.pop("config")),
    ("encoder.prompts of its tensors are not", lambda _, tensors: tensors.pop("encoder.prompts")),
    ("more of its tensors are not", lambda _, tensors: tensors.update(more=torch.zeros(1))),
    ("of its tensors are not", lambda _, tensors: tensors.update({"decoder.query_map.bias": torch.ones(32).long()})),
    ("no numbers, in encoder.prompts; take an", lambda _, tensors: tensors["encoder.prompts"][0].fill_(math.nan)),
]


@pytest.mark.parametrize(("message", "change"), WRONG)
def test_changed_files_are_refused(message: str, change: Callable, saved: tuple[SptSeg, Path], clip: Clip) -> None:
    with pytest.raises(ValueError, match=rf"model.safetensors (cannot be loaded|is no checkpoint).*{message}"):
        load_model(rewritten(saved[1], change), clip)


TENSOR = {"a": torch.zeros(1)}
BYTES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda whole: whole[:-9], "longer": lambda whole: whole + b"x", "huge header": lambda _: bytes(7) + b"\x80{",
    "one bit": lambda whole: whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:],
    "offsets": lambda _: struct.pack("<Q", 62) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36000000]}}  ',
    "no header of ours": lambda _: save(TENSOR), "no JSON": lambda _: save(TENSOR, metadata={"sptseg": "{"}),
    "deep JSON": lambda _: save(TENSOR, metadata={"sptseg": "[" * 10**5 + "]" * 10**5}),
    "another JSON": lambda _: save(TENSOR, metadata={"sptseg": "[1]"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", BYTES)
def test_other_files_are_refused(kind: str, saved: tuple[SptSeg, Path], clip: Clip) -> None:
    path = saved[1]
    path.write_bytes(BYTES[kind](path.read_bytes()))
    with pytest.raises(ValueError, match=r"model.safetensors is (no checkpoint of sptseg \(.+\); wanted|damaged: its)"):
        load_model(path, clip)


ARCHITECTURES: list[tuple[str, Any]] = [
    ("vision_cfg", {"timm_model_name": "vit_base_patch16_224"}), ("text_cfg", {"hf_model_name": "someone/model"}),
    ("vision_cfg", {"width": 10**30}), ("vision_cfg", {"width": "x"}), ("vision_cfg", {"layers": 10**9}),
    ("vision_cfg", {"patch_size": [0, 4]}), ("vision_cfg", None), ("text_cfg", {"vocab_size": 2**19}),
    ("text_cfg", {"layers": 99}), ("embed_dim", 64), ("more", 1),
]  # fmt: skip


@pytest.mark.parametrize(("part", "change"), ARCHITECTURES, ids=lambda value: repr(value)[:30])
def test_the_sizes_of_an_imported_clip_are_held_to_its_tensors(part: str, change: Any, tmp_path: Path) -> None:
    """Other keys are refused too: open_clip has some that load models by name."""

    def hostile(header: dict, _: dict) -> None:
        sizes = header["architecture"]
        sizes[part] = {**sizes[part], **change} if isinstance(change, dict) else change

    path = rewritten(save_model(load_reference("zegclip").imported, tmp_path), hostile)
    with pytest.raises(ValueError, match=rf"{path} cannot be loaded: .+"):
        load_model(path)


# Of the research code: read as data only, and what no forward pass reads is left out by name


def sizes(reference: Reference) -> dict[str, int]:
    return {key: reference.config[key] for key in ("image_size", "heads", "decoder_heads")}


def test_a_pth_file_with_a_text_encoder(tmp_path: Path) -> None:
    """As mmseg writes them. The text encoder, here narrow, is read; what no forward pass reads is named."""
    text = {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 2}
    vision = {"image_size": 8, "patch_size": 4, "width": 16, "layers": 1, "head_width": 16}
    tower, reference = open_clip.CLIP(32, vision, text, quick_gelu=True).eval(), load_reference("zegclip")
    own = {name: value for name, value in tower.state_dict().items() if not name.startswith(("visual.", "logit"))}
    state = {**reference.state, **{f"text_encoder.{name}": value for name, value in own.items()}}
    state["decode_head.conv_seg.bias"] = torch.zeros(2)
    meta = {"epoch": 3, "iter": 20000, "CLASSES": ("cow", "sky"), "PALETTE": [[1, 2, 3]], "hook_msgs": {}}
    torch.save({"state_dict": state, "meta": meta, "optimizer": {"state": {}}}, tmp_path / "zegclip.pth")
    imported = import_research_checkpoint(tmp_path / "zegclip.pth", **sizes(reference))
    assert torch.equal(logits(imported, 128), logits(reference.imported, 128))
    names = ["cow", "playing field"]
    tokens = open_clip.SimpleTokenizer(context_length=16)([f"a photo of a {name}" for name in names])
    expected = F.normalize(tower.encode_text(tokens), dim=-1)
    assert_close(imported.class_embeddings(names), expected.detach())
    assert set(imported.about["left_out"]) == {*reference.imported.about["left_out"], "decode_head.conv_seg.bias"}
    report = import_report(imported)
    assert report.startswith("ZegCLIP checkpoint, 3 prompt tokens, with a text encoder; left out")
    assert all(f"  {name}" in report.splitlines() for name in imported.about["left_out"])
    path = save_model(imported, tmp_path / "ours.safetensors")
    assert torch.equal(load_model(path).class_embeddings(names), imported.class_embeddings(names))


@pytest.mark.parametrize("form", ["wrapped.pth", "flat.bin", "flat.SAFETENSORS", "a mapping"])
def test_forms_of_research(form: str, reference: Reference, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is left out is logged."""
    state: Any = {f"module.{name}": value for name, value in reference.state.items()}
    source: Any = {"state_dict": state} if form == "wrapped.pth" else state
    (save_file if form.endswith("SAFETENSORS") else torch.save)(source, tmp_path / form)
    with caplog.at_level("INFO", logger="sptseg"):
        model = import_research_checkpoint(source if form == "a mapping" else str(tmp_path / form), **sizes(reference))
    assert torch.equal(logits(model, 128), logits(reference.imported, 128))
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith(import_report(reference.imported).split("\n")[0])
    half = import_research_checkpoint({name: value.half() for name, value in state.items()}, **sizes(reference))
    assert logits(half, 128).dtype == torch.float32


def without(*names: str) -> Callable[[dict], dict]:
    return lambda state: {name: value for name, value in state.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (without("decode_head.q_proj.bias"), {}, "no whole one of .* research code.*decoder.query_map.bias"),
        (without("backbone.complex_weight", "backbone.prompt_norm.bias"), {}, "no whole one .*prompt_norm.bias"),
        (lambda state: {**state, "text_encoder.ln_final.bias": torch.zeros(8)}, {}, "no whole one .*token_embedding"),
        (without("backbone.transformer.resblocks.1.ln_1.bias"), {}, "no whole one .*resblocks.1.ln_1.bias"),
        (dict, {"image_size": 64}, "does not go with image_size .64, 64., heads 4 .*encoder.spectral_prompt.weight"),
        (dict, {"decoder_heads": 4}, "decoder_heads 4: .*size mismatch"),
    ],
)
def test_research_checkpoints_that_do_not_fit_are_refused(change: Callable, options: dict, message: str) -> None:
    reference = load_reference("spt")
    with pytest.raises(ValueError, match=message) as refusal:
        import_research_checkpoint(change(reference.state), **{**sizes(reference), **options})
    assert "\n" not in str(refusal.value)
