"""Checkpoints come back bit for bit, damaged ones are refused by name, research-code files are read as data only."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import WORDS, Reference, load_reference, small_clip
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from sptseg.checkpoints.checkpoint import config_from_dict, load_model, read_header, save_model
from sptseg.checkpoints.research import (
    Imported,
    import_research,
    import_research_checkpoint,  # fmt: skip
)
from sptseg.model.clip import Clip, load_clip, new_tiny_clip, save_tiny_clip
from sptseg.model.config import SPT_RELEASED, ModelConfig
from sptseg.model.spt_seg import SptSeg, build_model

CONFIG = ModelConfig(clip="small", image_size=(32, 32), prompt_tokens=3, templates=("a photo of a {}", "a {}"))


@pytest.fixture
def saved(clip: Clip, tmp_path: Path) -> tuple[SptSeg, Path]:
    model = build_model(CONFIG, clip).eval()
    return model, save_model(model, tmp_path / "model.safetensors", {"seed": 3})


def logits(model: SptSeg, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    width = model.encoder.visual.output_dim
    text = F.normalize(torch.randn(4, width, generator=generator), dim=-1)
    with torch.no_grad():
        return model(torch.randn(2, 3, size, size, generator=generator), text)


# Ours


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"decoder": "cross_attention", "loss": "zegclip", "spectral_layers": ()},
        {"start": "dense_clip", "selection": False, "prompt_tokens": 0},
        {"decoder": "none", "prompt_tokens": 0, "spectral_layers": ()},
    ],
)
def test_save_and_load_give_the_same_bits(changes: dict, clip: Clip, tmp_path: Path) -> None:
    config = ModelConfig(**{"clip": "small", "image_size": (24, 40), **changes})
    model = build_model(config, clip).eval()
    path = save_model(model, tmp_path / "a" / "folder")
    assert path == tmp_path / "a" / "folder" / "model.safetensors"
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]
    loaded = load_model(path.parent, clip)
    assert loaded.config == config
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))


def test_only_trained_parts_and_the_configuration_are_in_the_file(saved: tuple[SptSeg, Path]) -> None:
    model, path = saved
    tensors = load_file(path)
    assert {name: value.shape for name, value in tensors.items()} == {
        name: p.shape for name, p in model.named_parameters() if p.requires_grad
    }
    header = read_header(path)
    assert header["about"] == {"seed": 3}
    assert config_from_dict(header["config"]) == CONFIG


def test_configuration_is_read_back_from_json() -> None:
    for config in (SPT_RELEASED, CONFIG):
        assert config_from_dict(json.loads(json.dumps(asdict(config)))) == config


def test_a_new_process_computes_the_same_bits(tmp_path: Path) -> None:
    """Of a model on a CLIP of its own name, and of an imported one, whose CLIP is in the checkpoint."""
    save_tiny_clip(new_tiny_clip(WORDS), tmp_path / "clip.safetensors")
    tiny = load_clip("tiny", str(tmp_path / "clip.safetensors"))
    own = build_model(ModelConfig(clip_weights=str(tmp_path / "clip.safetensors")), tiny).eval()
    models = {"own": (own, 64), "imported": (load_reference("spt").imported.model, 128)}
    for name, (model, size) in models.items():
        save_model(model, tmp_path / f"{name}.safetensors")
        save_file({"logits": logits(model, size)}, tmp_path / f"{name}-logits.safetensors")
    script = f"""
import sys, torch
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
torch.set_num_threads(1)
from safetensors.torch import load_file
from test_checkpoints import load_clip, load_model, logits
tiny = load_clip("tiny", f"{{sys.argv[1]}}/clip.safetensors")
for name, size, clip in (("own", 64, tiny), ("imported", 128, None)):
    expected = load_file(f"{{sys.argv[1]}}/{{name}}-logits.safetensors")["logits"]
    assert torch.equal(logits(load_model(f"{{sys.argv[1]}}/{{name}}.safetensors", clip), size), expected), name
"""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def rewritten(path: Path, change: Callable[[dict, dict], None]) -> Path:
    """The checkpoint with its header and tensors changed."""
    header, tensors = read_header(path), load_file(path)
    change(header, tensors)
    save_file(tensors, path, metadata={"sptseg": json.dumps(header)})
    return path


@pytest.mark.parametrize("keep", [0, 4, 200, 0.5, 0.999])
def test_truncated_files_are_refused(saved: tuple[SptSeg, Path], clip: Clip, keep: float) -> None:
    path = saved[1]
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(ValueError, match=r"model.safetensors is not a readable safetensors file"):
        load_model(path, clip)


def test_other_files_are_refused(saved: tuple[SptSeg, Path], clip: Clip, tmp_path: Path) -> None:
    text = tmp_path / "notes.safetensors"
    text.write_text("not a checkpoint, though a text of some length")
    with pytest.raises(ValueError, match="notes.safetensors is not a readable safetensors file .* sptseg import"):
        load_model(text, clip)
    plain = tmp_path / "plain.safetensors"
    save_file({"a": torch.zeros(1)}, plain)
    with pytest.raises(ValueError, match="plain.safetensors holds no sptseg configuration"):
        load_model(plain, clip)
    save_file({"a": torch.zeros(1)}, plain, metadata={"sptseg": "{"})
    with pytest.raises(ValueError, match="plain.safetensors holds no sptseg configuration"):
        load_model(plain, clip)
    with pytest.raises(
        FileNotFoundError, match="there is no checkpoint .*nowhere; wanted embedded, .*dense-clip, or a file"
    ):
        load_model(tmp_path / "nowhere", clip)
    saved[1].unlink()
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_model(tmp_path, clip)  # a folder without model.safetensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda header, _: header.update(format="sptseg-9"),
            "has the format 'sptseg-9'; this version reads 'sptseg-1'",
        ),
        (lambda header, _: header["config"].update(colour="red"), "unknown ModelConfig fields: colour; known are"),
        (lambda header, _: header["config"].update(decoder="unet"), "decoder is 'unet'; choose one of"),
        (lambda header, _: header["config"].update(prompt_tokens="many"), "wrong configuration"),
        (lambda header, _: header["config"].update(decoder_heads=5), "no multiple of decoder_heads 5"),
        (
            lambda header, _: header["config"].update(decoder_layers=2),
            "does not fit its configuration: decoder.layers.1",
        ),
        (lambda header, _: header["config"].update(prompt_tokens=4), "does not fit its configuration: encoder.prompts"),
        (lambda header, _: header.pop("config"), "'config'"),
        (lambda _, tensors: tensors.pop("encoder.prompts"), "does not fit its configuration: encoder.prompts"),
        (lambda _, tensors: tensors.update(more=torch.zeros(1)), "does not fit its configuration: more"),
        (
            lambda _, tensors: tensors.update({"decoder.query_map.weight": torch.zeros(32, 32)}),
            "does not fit its configuration: decoder.query_map.weight",
        ),
    ],
)
def test_changed_checkpoints_are_refused_with_file_and_reason(
    saved: tuple[SptSeg, Path], clip: Clip, change: Callable, message: str
) -> None:
    path = rewritten(saved[1], change)
    with pytest.raises(ValueError, match=message) as refusal:
        load_model(path, clip)
    assert str(path) in str(refusal.value)


def test_a_checkpoint_older_than_a_field_has_its_default(saved: tuple[SptSeg, Path], clip: Clip) -> None:
    path = rewritten(saved[1], lambda header, _: header["config"].pop("readout"))
    assert load_model(path, clip).config == saved[0].config


@pytest.mark.parametrize("place", [-1, -1000])
def test_a_changed_bit_is_noticed(saved: tuple[SptSeg, Path], clip: Clip, place: int) -> None:
    """Every file holds a checksum; the embedded ones, written before there was one, load without."""
    path = saved[1]
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors is damaged: its tensors have not the checksum"):
        load_model(path, clip)
    rewritten(path, lambda header, _: header.pop("sha256"))
    load_model(path, clip)


def test_weights_that_are_no_numbers_are_refused(saved: tuple[SptSeg, Path], clip: Clip) -> None:
    path = rewritten(saved[1], lambda _, tensors: tensors["encoder.prompts"][0].fill_(float("nan")))
    with pytest.raises(ValueError, match="values that are no numbers, in encoder.prompts; take an earlier checkpoint"):
        load_model(path, clip)


@pytest.mark.parametrize("name", ["tiny", "ViT-B-32", "small"])
def test_no_path_in_a_checkpoint_is_opened(
    saved: tuple[SptSeg, Path], clip: Clip, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It loads with a CLIP that the caller gives; without, the path is refused before anything is read."""
    opened = []
    monkeypatch.setattr("sptseg.checkpoints.checkpoint.load_clip", lambda *names: opened.append(names))
    path = rewritten(saved[1], lambda header, _: header["config"].update(clip=name, clip_weights="/etc/passwd"))
    with pytest.raises(ValueError, match=r"names CLIP .* weights '/etc/passwd', which is not public, and no path"):
        load_model(path)
    assert not opened
    assert load_model(path, clip).config.clip_weights == "/etc/passwd"


# Imported


def sizes(reference: Reference) -> dict[str, int]:
    return {key: reference.config[key] for key in ("image_size", "heads", "decoder_heads")}


def test_imported_models_save_and_load(reference: Reference, tmp_path: Path) -> None:
    model = reference.imported.model
    path = save_model(model, tmp_path / "imported.safetensors")
    loaded = load_model(path)
    assert loaded.config == model.config
    assert torch.equal(logits(loaded, 128), logits(model, 128))
    with pytest.raises(ValueError, match="without a text encoder; call it with text embeddings"):
        loaded.class_embeddings(["tree"])


@pytest.mark.parametrize(
    "change",
    [
        lambda header, _: header.pop("architecture"),
        lambda header, _: header["architecture"]["vision_cfg"].update(layers=3),
        lambda _, tensors: tensors.pop("clip.visual.proj"),
    ],
)
def test_an_imported_checkpoint_whose_clip_was_changed_is_refused_by_name(change: Callable, tmp_path: Path) -> None:
    path = rewritten(save_model(load_reference("zegclip").imported.model, tmp_path / "imported.safetensors"), change)
    with pytest.raises(ValueError, match="imported.safetensors"):
        load_model(path)


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
    assert isinstance(imported, Imported)
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


def test_a_part_of_a_text_encoder_is_left_out_by_name(text_tower: open_clip.CLIP) -> None:
    reference = load_reference("spt")
    state = {**reference.state, **text_state(text_tower)}
    del state["text_encoder.ln_final.weight"]
    imported = import_research(state, **sizes(reference))
    assert "text_encoder.token_embedding.weight" in imported.left_out
    assert imported.report().startswith("SPT-SEG checkpoint, 3 prompt tokens, without a text encoder")


@pytest.mark.parametrize("wrap", [dict, lambda state: {"state_dict": state}])
def test_prefixes_of_data_parallel_training_and_half_precision(reference: Reference, wrap: Callable) -> None:
    state = {f"module.{name}": value for name, value in reference.state.items()}
    model = import_research_checkpoint(wrap(state), **sizes(reference))
    assert torch.equal(logits(model, 128), logits(reference.imported.model, 128))
    half = import_research_checkpoint({name: value.half() for name, value in state.items()}, **sizes(reference))
    assert logits(half, 128).dtype == torch.float32


def test_a_safetensors_file(reference: Reference, tmp_path: Path) -> None:
    save_file(reference.state, tmp_path / "theirs.safetensors")
    model = import_research_checkpoint(str(tmp_path / "theirs.safetensors"), **sizes(reference))
    assert torch.equal(logits(model, 128), logits(reference.imported.model, 128))


class Intruder:
    """What a malicious checkpoint would hold: unpickling it runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_a_pickle_with_other_objects_is_refused_and_not_run(how: Callable, tmp_path: Path) -> None:
    reference, trace = load_reference("zegclip"), tmp_path / "intruder-was-here"
    how({"state_dict": reference.state, "meta": Intruder(trace)}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="bad.pth cannot be read as a checkpoint of tensors only; .* save it again"):
        import_research_checkpoint(tmp_path / "bad.pth", **sizes(reference))
    assert not trace.exists()


def without(*names: str) -> Callable[[dict], dict]:
    return lambda state: {name: value for name, value in state.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (without("backbone.conv1.weight"), {}, "has no backbone.conv1.weight; wanted one of SPT-SEG's or ZegCLIP's"),
        (without("decode_head.q_proj.bias"), {}, "lacks what decoder.query_map.bias would be read from"),
        (without("backbone.complex_weight", "backbone.prompt_norm.bias"), {}, "lacks what encoder.prompt_norm.bias"),
        (without("backbone.proj"), {}, "lacks 'proj'"),
        (without("backbone.transformer.resblocks.1.ln_1.bias"), {}, "lacks .*resblocks.1.ln_1.bias"),
        (dict, {"image_size": 64}, "does not fit image_size .64, 64., heads 4, .*: encoder.spectral_prompt.weight"),
        (dict, {"heads": 5}, "heads is 5; the encoder's width 32 is no multiple of it"),
        (dict, {"decoder_heads": 4}, "does not fit .* decoder_heads 4"),
        (dict, {"image_size": 130}, "image_size"),
    ],
)
def test_research_checkpoints_that_do_not_fit_are_refused(change: Callable, options: dict, message: str) -> None:
    reference = load_reference("spt")
    with pytest.raises(ValueError, match=message):
        import_research_checkpoint(change(reference.state), **{**sizes(reference), **options})


@pytest.mark.parametrize("name", ["damaged.pth", "damaged.safetensors"])
@pytest.mark.parametrize("content", [b"", b"some text", b"PK\x03\x04 half a zip file"])
def test_damaged_research_files_are_refused_by_name(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        import_research_checkpoint(tmp_path / name, image_size=128, heads=4)


def test_files_that_hold_no_state_are_refused(tmp_path: Path) -> None:
    for i, value in enumerate(([1, 2], torch.zeros(3), {"state_dict": None}, {"epoch": 3})):
        torch.save(value, tmp_path / f"{i}.pth")
        with pytest.raises(ValueError, match="wanted one of SPT-SEG's or ZegCLIP's research code"):
            import_research_checkpoint(tmp_path / f"{i}.pth", image_size=128, heads=4)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint file .*nowhere.pth"):
        import_research_checkpoint(tmp_path / "nowhere.pth", image_size=128, heads=4)


def test_the_filter_of_an_imported_model_serves_other_grids() -> None:
    model = load_reference("spt").imported.model
    assert logits(model, 96).shape == (2, 4, 24, 24)


def test_small_clip_is_not_changed_by_building_a_model() -> None:
    clip = small_clip()
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    build_model(CONFIG, clip)
    assert all(torch.equal(value, before[name]) for name, value in clip.model.state_dict().items())
