"""CLIP's words, embeddings and files: weights in every form that people have, and nothing in them is run."""

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
import torch.nn.functional as F
from conftest import WORDS, small_clip
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._utils import _rebuild_tensor_v2
from torch.testing import assert_close
from toys import Intruder, same

from sptseg.model.clip import WordTokenizer, fingerprint, load_clip, new_tiny_clip, save_tiny_clip, usable_models
from sptseg.model.weights import read_weights


def test_words_are_numbered_and_cut_at_blanks_and_commas() -> None:
    """Start 9, end 10; CLIP pools at the highest id."""
    rows = WordTokenizer(WORDS, context_length=8)(["A Tree,water", ""])
    assert rows.tolist() == [[9, 1, 6, 5, 10, 0, 0, 0], [9, 10, 0, 0, 0, 0, 0, 0]] and rows.dtype == torch.long


def test_the_tiny_clip_comes_back_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision: what is read is the written weights, rounded once."""
    clip = new_tiny_clip(WORDS)
    save_tiny_clip(clip, tmp_path / "tiny.safetensors")
    loaded = load_clip("tiny", str(tmp_path / "tiny.safetensors"))
    assert (loaded.name, loaded.weights) == ("tiny", str(tmp_path / "tiny.safetensors"))
    assert loaded.tokenizer == clip.tokenizer and not loaded.model.training
    rounded = {name: value.half().float() for name, value in clip.model.state_dict().items()}
    assert same(loaded.model.state_dict(), rounded)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert {value.dtype for value in load_file(tmp_path / "tiny.safetensors").values()} == {torch.float16}
    monkeypatch.setattr("sptseg.model.clip.__file__", str(tmp_path / "sptseg" / "model" / "clip.py"))
    with pytest.raises(FileNotFoundError, match=r"the embedded file tiny_clip\.safetensors is missing .*reinstall"):
        load_clip()


@pytest.mark.parametrize("templates", [("a photo of a {}",), ("a photo of a {}", "a {}", "{}")])
def test_class_embeddings_by_hand(templates: tuple[str, ...]) -> None:
    clip = small_clip()
    found = clip.class_embeddings(WORDS, templates)
    assert found.shape == (len(WORDS), 32) and found.dtype == torch.float32 and not found.requires_grad
    assert_close(found.norm(dim=1), torch.ones(len(WORDS)))
    for row, name in zip(found, WORDS, strict=True):
        units = [clip.model.encode_text(clip.tokenizer([t.format(name)]), normalize=True)[0] for t in templates]
        assert_close(row, F.normalize(sum(units), dim=0))


def test_embeddings_are_computed_once_and_handed_out_as_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of 256 prompts."""
    clip, calls = small_clip(), []
    encode = clip.model.encode_text
    monkeypatch.setattr(clip.model, "encode_text", lambda tokens: calls.append(len(tokens)) or encode(tokens))
    first = clip.class_embeddings(["tree", "boat"])
    kept = first.clone()
    first.zero_()
    assert torch.equal(clip.class_embeddings(("tree", "boat")), kept)
    assert calls == [2]
    clip.class_embeddings(["boat", "tree"])
    clip.class_embeddings(["tree", "boat"], ["a {}"])
    names = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS][:300]
    assert_close(clip.class_embeddings(names)[290:], clip.class_embeddings(names[290:]))
    assert calls == [2, 2, 2, 256, 44, 10]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "the list of classes is empty"),
        (["tree", " "], "the class name at position 1 is blank"),
        (["tree", "boat", "tree"], "class names given twice: tree"),
        (["tree", "Tree", "a  boat", " a boat"], "class names given twice: Tree, a  boat, a boat, tree; name each"),
        (["café", "cafe\u0301"], "class names given twice: cafe\u0301, café"),
        (["zebra"], "does not know 'zebra' .* it knows the words a, photo, .* or a CLIP that knows any word"),
        (["tree " * 12], "this CLIP reads at most 10"),
    ],
)
def test_class_names_that_do_not_go_are_refused(names: list, message: str) -> None:
    """Twice is what the tokenizers read alike: in another case, with other blanks, in another Unicode form."""
    with pytest.raises(ValueError, match=message):
        small_clip().class_embeddings(names)


@pytest.mark.parametrize(
    ("name", "tag"), [("ViT-B-16", "openai"), ("ViT-B-32", "metaclip_400m"), ("RN50", "openai"), ("no-model", "openai")]
)
def test_models_are_refused_before_anything_is_built(name: str, tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for builder in ("open_clip.create_model", "open_clip.CLIP"):
        monkeypatch.setattr(builder, lambda *_, **__: pytest.fail("the model was built"))
    message = f"'{name}' is no open_clip model with a vision .* use tiny, .*ViT-L-14"
    if name in usable_models():
        message = f"{tag} were trained with QuickGELU, which '{name}' lacks; use '{name}-quickgelu'"
    with pytest.raises(ValueError, match=message):
        load_clip(name, tag)


def test_random_weights_come_from_torchs_seed() -> None:
    clip = load_clip("ViT-S-32")
    assert (clip.name, clip.weights, clip.model.training) == ("ViT-S-32", None, False)
    torch.manual_seed(0)
    assert fingerprint(load_clip("ViT-S-32")) == fingerprint(clip) != fingerprint(load_clip("ViT-S-32"))
    assert_close(clip.class_embeddings(["a unicorn"]).norm(), torch.tensor(1.0))


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


def holds(name: str, path: str | Path, expected: dict[str, Tensor]) -> bool:
    found = load_clip(name, str(path)).model.state_dict()
    return same(found, expected) and found["visual.conv1.weight"].dtype == torch.float32


@pytest.mark.filterwarnings("ignore")  # its writer is deprecated, its files are not
def test_openais_archive_is_read_without_its_code(model: open_clip.CLIP, tmp_path: Path) -> None:
    state = {name: value.half().float() for name, value in model.state_dict().items()}
    path = openai(model, tmp_path / "ViT-toy.pt")
    assert holds("toy-quickgelu", path, state)
    spoilt = tmp_path / "spoilt.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(spoilt, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"raise SystemExit" if "/code/" in name else old.read(name))
    with pytest.raises(RuntimeError):
        torch.jit.load(str(spoilt))  # which does look at the code
    assert holds("toy-quickgelu", spoilt, state)
    with pytest.raises(ValueError, match="toy.pt were trained with QuickGELU, which 'toy' lacks; use 'toy-q"):
        load_clip("toy", str(path))


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


FORMS: dict[str, Callable[[Any, Path], object]] = {
    "training.pt": lambda state, path: torch.save({"state_dict": {f"module.{k}": state[k] for k in state}}, path),
    "a ünicode näme.bin": torch.save,
    "old.pth": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "open_clip_model.safetensors": save_file, "renamed.pts": save_file,
    "pytorch_model.bin": lambda state, path: torch.save(in_transformers_names(state), path),
    "model.safetensors": lambda state, path: save_file(in_transformers_names(state), path),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_open_clips_and_transformers_names(
    name: str, model: open_clip.CLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FORMS[name](model.state_dict(), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (tmp_path / name, name, f"~/{name}"):
        assert holds("toy", path, model.state_dict())


OTHER: list[tuple[Callable[[dict], object], str]] = [
    (lambda state: state.pop("ln_final.bias"), 'Missing .*"ln_final.bias"'),
    (lambda state: state.update(head=torch.zeros(2)), 'Unexpected .*"head"'),
    (lambda state: state.update({"visual.proj": torch.zeros(16, 9)}), r"visual.proj: .*\[16, 9\].*\[16, 16\]"),
    (lambda state: state.update({"visual.proj": torch.zeros(16, 16).char()}), r"visual.proj is torch.int8"),
    (lambda state: state.clear(), "Missing"),
]


@pytest.mark.parametrize(("change", "message"), OTHER)
def test_other_weights_are_refused(change: Callable, message: str, model: open_clip.CLIP, tmp_path: Path) -> None:
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
