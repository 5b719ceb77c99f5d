"""Files of CLIP weights in every form that people have, from OpenAI's archives on; nothing in them is run."""

from __future__ import annotations

import io
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch._utils import _rebuild_tensor_v2
from toys import Intruder

from sptseg.model.clip import load_clip
from sptseg.model.weights import read_weights

VISION: Any = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}
TEXT: Any = {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
TOY: dict[str, Any] = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> open_clip.CLIP:
    """Small enough for a file a test; open_clip has its configuration as "toy", and as "toy-quickgelu"."""
    for name, config in {"toy": TOY, "toy-quickgelu": {**TOY, "quick_gelu": True}}.items():
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
    return open_clip.CLIP(**TOY, quick_gelu=True).eval()


def openai(model: open_clip.CLIP, path: Path) -> Path:
    """As OpenAI ships its models: traced, in half precision, with three numbers more."""
    for name, value in {"input_resolution": 16, "context_length": 8, "vocab_size": 49408}.items():
        model.__dict__.pop(name, None)
        model.register_buffer(name, torch.tensor(value))
    example = {"image": torch.zeros(1, 3, 16, 16), "text": torch.zeros(1, 8, dtype=torch.long)}
    traced: Any = torch.jit.trace(model, example_kwarg_inputs=example, check_trace=False)
    traced.half().save(str(path))
    return path


def holds(name: str, path: str | Path, expected: dict[str, Tensor], half: bool = False) -> bool:
    clip = load_clip(name, str(path))
    found = clip.model.state_dict()
    same = all(torch.equal(found[key], value.half().float() if half else value) for key, value in expected.items())
    return same and found.keys() == expected.keys() and clip.visual.conv1.weight.dtype == torch.float32


@pytest.mark.filterwarnings("ignore")  # its writer is deprecated, its files are not
def test_openais_archive_is_read_without_its_code(model: open_clip.CLIP, tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    path = openai(model, tmp_path / "ViT-toy.pt")
    assert holds("toy-quickgelu", path, state, half=True)
    spoilt = tmp_path / "spoilt.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(spoilt, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"raise SystemExit" if "/code/" in name else old.read(name))
    with pytest.raises(RuntimeError):
        torch.jit.load(str(spoilt))  # which does look at the code
    assert holds("toy-quickgelu", spoilt, state, half=True)
    with pytest.raises(ValueError, match="toy.pt were trained with QuickGELU, which 'toy' lacks; use 'toy-q"):
        load_clip("toy", str(path))


FORMS: dict[str, Callable[[Any, Path], object]] = {
    "training.pt": lambda state, path: torch.save({"state_dict": {f"module.{k}": state[k] for k in state}}, path),
    "a ünicode näme.bin": torch.save,
    "old.pth": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "open_clip_model.safetensors": save_file, "M.SAFETENSORS": save_file,
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_open_clips_names(
    name: str, model: open_clip.CLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FORMS[name](model.state_dict(), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (tmp_path / name, name, f"~/{name}"):
        assert holds("toy", path, model.state_dict())


def in_transformers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Written out from the names that its CLIPModel gives its parameters."""
    vision, text = "vision_model.embeddings.", "text_model.embeddings."
    theirs = {
        "logit_scale": state["logit_scale"], f"{vision}position_ids": torch.arange(5)[None],
        "visual_projection.weight": state["visual.proj"].T, "text_projection.weight": state["text_projection"].T,
        f"{vision}class_embedding": state["visual.class_embedding"],
        f"{vision}patch_embedding.weight": state["visual.conv1.weight"],
        f"{vision}position_embedding.weight": state["visual.positional_embedding"],
        f"{text}token_embedding.weight": state["token_embedding.weight"],
        f"{text}position_embedding.weight": state["positional_embedding"],
    }  # fmt: skip
    parts = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
    parts |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    blocks = {f"visual.transformer.resblocks.{i}": f"vision_model.encoder.layers.{i}" for i in (0, 1)}
    blocks["transformer.resblocks.0"] = "text_model.encoder.layers.0"
    for kind in ("weight", "bias"):
        theirs[f"vision_model.pre_layrnorm.{kind}"] = state[f"visual.ln_pre.{kind}"]
        theirs[f"vision_model.post_layernorm.{kind}"] = state[f"visual.ln_post.{kind}"]
        theirs[f"text_model.final_layer_norm.{kind}"] = state[f"ln_final.{kind}"]
        for block, layer in blocks.items():
            three = state[f"{block}.attn.in_proj_{kind}"].chunk(3)
            theirs |= {f"{layer}.self_attn.{x}_proj.{kind}": part for x, part in zip("qkv", three, strict=True)}
            theirs |= {f"{layer}.{part}.{kind}": state[f"{block}.{ours}.{kind}"] for ours, part in parts.items()}
    return {name: value.contiguous() for name, value in theirs.items()}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "renamed.pts"])
def test_transformers_names(name: str, model: open_clip.CLIP, tmp_path: Path) -> None:
    (save_file if name.endswith("s") else torch.save)(in_transformers_names(model.state_dict()), tmp_path / name)
    assert holds("toy", tmp_path / name, model.state_dict())


OTHER: list[tuple[Callable[[dict], object], str]] = [
    (lambda state: state.pop("ln_final.bias"), 'Missing .*"ln_final.bias"'),
    (lambda state: state.update(head=torch.zeros(2)), 'Unexpected .*"head"'),
    (lambda state: state.update({"visual.proj": torch.zeros(16, 9)}), r"visual.proj: .*\[16, 9\].*\[16, 16\]"),
    (lambda state: state.update({"visual.proj": torch.zeros(16, 16).char()}), r"visual.proj is torch.int8"),
    (lambda state: state.clear(), "Missing"),
]


@pytest.mark.parametrize(("change", "message"), OTHER)
def test_other_weights_are_refused_by_what_differs(
    change: Callable, message: str, model: open_clip.CLIP, tmp_path: Path
) -> None:
    state = dict(model.state_dict())
    change(state)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=f"other.pt holds no weights of toy: .*{message}") as refusal:
        load_clip("toy", str(tmp_path / "other.pt"))
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 600
    for weights in ("opnai", "nowhere/ViT-B-32.pt", str(tmp_path)):
        with pytest.raises(ValueError, match=f"{weights} is no file, and no tag of ViT-B-32; .* openai, laion400m_e31"):
            load_clip("ViT-B-32", weights)
    torch.save([1, 2], tmp_path / "other.pt")
    assert read_weights(tmp_path / "other.pt") == {}


# Files that would run code, or are none


BROKEN: dict[str, tuple[Callable[[Path], bytes], str]] = {  # the content, and the reason that is given
    "a pickle": (lambda path: pickle.dumps({"state_dict": Intruder(path)}), "Weights only load failed"),
    "an old pickle": (lambda path: pickle.dumps(Intruder(path), protocol=0), "Weights only load failed"),
    "an archive": (lambda path: archive({"x": Intruder(path)}), "it names (posix|nt).mkdir"),
    "an archive of no module": (lambda _: archive([1]), "attributes"),
    "an archive that is compressed": (lambda _: archive({"x": 1}, zipfile.ZIP_DEFLATED), "data.pkl is compressed"),
    "one number a trillion times": (lambda _: archive({"x": Stored((10**12,), (0,))}), "larger than its storage"),
    "a missing storage": (lambda _: archive({"x": Stored((4,), (1,), "7")}), "no item named 'toy/data/7'"),
    "an archive cut": (lambda _: archive({"x": Stored((2,), (1,))})[:-200], "."), "nothing": (lambda _: b"", "."),
    "a text": (lambda _: b"no checkpoint", "."), "zip": (lambda _: b"PK\x03\x04" + bytes(99), "."),
    "wrong operations": (lambda _: b"\x80\x02" + bytes(range(40, 120)), "."),
}  # fmt: skip


class Stored:
    """A tensor of four numbers' storage."""

    def __init__(self, size: tuple, stride: tuple, key: str = "0") -> None:
        self.arguments = (SimpleNamespace(key=key), 0, size, stride, False, OrderedDict())

    def __reduce__(self) -> tuple:
        return _rebuild_tensor_v2, self.arguments


def archive(attributes: Any, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A TorchScript archive of one module, of a class of its own, which is pickled by name."""
    module_class = type("Module", (), {"__module__": "__torch__"})

    class Writer(pickle.Pickler):
        def persistent_id(self, value: Any) -> tuple | None:
            return ("storage", torch.HalfStorage, value.key, "cpu", 4) if isinstance(value, SimpleNamespace) else None

    module: Any = attributes
    if isinstance(attributes, dict):
        module = module_class()
        module.__dict__.update(attributes)
    content, tree = io.BytesIO(), io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "__torch__", SimpleNamespace(Module=module_class))
        Writer(tree, protocol=2).dump(module)
    with zipfile.ZipFile(content, "w", compression) as file:
        for name, data in {"data.pkl": tree.getvalue(), "data/0": bytes(8), "constants.pkl": b"\x80\x02)."}.items():
            file.writestr(f"toy/{name}", data)
    return content.getvalue()


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_hold_no_tensors_are_refused_and_not_run(kind: str, suffix: str, tmp_path: Path) -> None:
    path, (content, reason) = tmp_path / f"model{suffix}", BROKEN[kind]
    path.write_bytes(content(tmp_path / "intruded"))
    reason = reason if suffix == ".pth" else "."
    message = rf"model{suffix} cannot be read as a .* tensors only \(.*{reason}.*\)"
    with pytest.raises(ValueError, match=message) as said:
        read_weights(path)
    assert "\n" not in str(said.value) and [file.name for file in tmp_path.iterdir()] == [path.name], "nothing ran"
