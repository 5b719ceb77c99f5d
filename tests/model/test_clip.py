"""The tiny CLIP's words and files, text embeddings by hand, and what open_clip models need a network for."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import WORDS, small_clip
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from torch.testing import assert_close

from sptseg.model import clip as clips
from sptseg.model.clip import WordTokenizer, load_clip, load_tiny_clip, new_tiny_clip, save_tiny_clip, usable_models

TOKENIZER = WordTokenizer(WORDS, context_length=8)


# Words


@given(st.lists(st.lists(st.sampled_from(WORDS), max_size=6), max_size=4))
def test_words_come_back_from_their_ids(texts: list[list[str]]) -> None:
    rows = TOKENIZER([" ".join(words) for words in texts])
    assert rows.shape == (len(texts), 8) and rows.dtype == torch.long
    names = {i: word for word, i in TOKENIZER.ids.items()}
    for row, words in zip(rows.tolist(), texts, strict=True):
        ids = row[: len(words) + 2]
        assert ids[0] == len(WORDS) + 1 and ids[-1] == len(WORDS) + 2
        assert [names[i] for i in ids[1:-1]] == words
        assert row[len(words) + 2 :] == [0] * (6 - len(words))
        assert row.index(max(row)) == len(words) + 1, "CLIP pools at the highest id"


def test_letter_case_and_commas_do_not_count() -> None:
    assert torch.equal(TOKENIZER(["A Tree,water"]), TOKENIZER(["a tree water"]))


def test_every_id_is_in_the_vocabulary() -> None:
    assert int(TOKENIZER([" ".join(WORDS[:6])]).max()) == TOKENIZER.vocabulary_size - 1
    assert sorted(TOKENIZER.ids.values()) == list(range(1, len(WORDS) + 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a unicorn", r"does not know 'unicorn' \(in 'a unicorn'\); it knows the words a, photo, .* house; use"),
        ("zebra photo yak", "does not know 'zebra', 'yak'"),
        ("tree " * 7, "has 7 words; this CLIP reads at most 6"),
    ],
)
def test_texts_that_do_not_go_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TOKENIZER(["tree", text])


# The tiny CLIP's file


def test_the_tiny_clip_comes_back_from_its_file(tmp_path: Path) -> None:
    """Half precision: what is read is the written weights, rounded once."""
    clip = new_tiny_clip(WORDS)
    save_tiny_clip(clip, tmp_path / "tiny.safetensors")
    loaded = load_clip("tiny", str(tmp_path / "tiny.safetensors"))
    assert (loaded.name, loaded.weights) == ("tiny", str(tmp_path / "tiny.safetensors"))
    assert loaded.tokenizer == clip.tokenizer
    theirs = loaded.model.state_dict()
    for name, value in clip.model.state_dict().items():
        assert torch.equal(theirs[name], value.half().float()), name
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    with safe_open(tmp_path / "tiny.safetensors", "pt") as file:
        assert json.loads(file.metadata()["words"]) == list(WORDS)
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}
    save_tiny_clip(loaded, tmp_path / "again.safetensors")
    again = load_tiny_clip(tmp_path / "again.safetensors").model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in theirs.items())


def test_a_missing_embedded_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(clips, "__file__", str(tmp_path / "sptseg" / "model" / "clip.py"))
    with pytest.raises(FileNotFoundError, match=r"the embedded file tiny_clip\.safetensors is missing .*reinstall"):
        load_clip()


def test_embedded_files_are_found_in_a_wheel_and_in_a_clone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(clips, "__file__", str(tmp_path / "sptseg" / "model" / "clip.py"))
    for folder in (tmp_path / "data", tmp_path / "sptseg" / "data"):  # the wheel's counts first
        folder.mkdir(parents=True)
        (folder / "x").touch()
        assert clips.data_file("x") == folder / "x"


# Text embeddings


@pytest.mark.parametrize("templates", [("a photo of a {}",), ("a photo of a {}", "a {}", "{}")])
def test_class_embeddings_by_hand(templates: tuple[str, ...]) -> None:
    clip = small_clip()
    found = clip.class_embeddings(WORDS, templates)
    assert found.shape == (len(WORDS), 32) and found.dtype == torch.float32 and not found.requires_grad
    assert_close(found.norm(dim=1), torch.ones(len(WORDS)))
    for row, name in zip(found, WORDS, strict=True):
        units = [clip.model.encode_text(clip.tokenizer([t.format(name)]), normalize=True)[0] for t in templates]
        assert_close(row, F.normalize(sum(units), dim=0))


def test_many_classes_go_in_parts() -> None:
    """More prompts than one part holds: 256."""
    clip = small_clip()
    names = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS][:300]
    found = clip.class_embeddings(names)
    assert_close(found[290:], small_clip().class_embeddings(names[290:]))


def test_embeddings_are_computed_once_and_handed_out_as_copies(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert calls == [2, 2, 2]


def test_embeddings_of_a_clip_in_half_precision_are_float32() -> None:
    clip = small_clip()
    expected = clip.class_embeddings(WORDS).clone()
    clip.cache.clear()
    clip.model.bfloat16()
    found = clip.class_embeddings(WORDS)
    assert found.dtype == torch.float32
    assert_close(found, expected, atol=0.05, rtol=0)


# open_clip's


def test_usable_models() -> None:
    names = usable_models()
    sizes = ("ViT-B-32", "ViT-B-16", "ViT-L-14")
    assert {*sizes, *(f"{size}-quickgelu" for size in sizes)} <= set(names) <= set(open_clip.list_models())
    assert not [name for name in names if "RN50" in name or "convnext" in name or "coca" in name or "SigLIP" in name]


@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("checksum"), ValueError("odd")])
def test_weights_that_cannot_be_downloaded(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence with a remedy, from open_clip's own loading."""

    def offline(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(open_clip.factory, "download_pretrained", offline)
    with pytest.raises(ValueError, match="'openai' of ViT-B-16-quickgelu could not be loaded .* path of a file"):
        load_clip("ViT-B-16-quickgelu", "openai")


def test_a_tag_that_a_model_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: pytest.fail("downloads"))
    with pytest.raises(ValueError, match="weights 'opnai' of ViT-S-32 could not be loaded"):
        load_clip("ViT-S-32", "opnai")


def test_random_weights_and_a_file_of_them(tmp_path: Path) -> None:
    """From torch's seed; a file gives the same bits."""
    clip = load_clip("ViT-S-32")
    assert (clip.name, clip.weights, clip.model.training) == ("ViT-S-32", None, False)
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())
    torch.save(clip.model.state_dict(), tmp_path / "weights.pt")
    loaded = load_clip("ViT-S-32", str(tmp_path / "weights.pt")).model.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in clip.model.state_dict().items())
    assert_close(clip.class_embeddings(["a unicorn"]).norm(), torch.tensor(1.0))


WRONG_WEIGHTS = {
    "noise.pt": bytes(range(256)),
    "empty.pt": b"",
    "noise.safetensors": bytes(range(256)),
    "pickle.bin": pickle.dumps({"x": 1}),
    "other.safetensors": save({"a": torch.zeros(2)}),
}


@pytest.mark.parametrize("name", WRONG_WEIGHTS)
def test_files_that_hold_no_weights_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(WRONG_WEIGHTS[name])
    with pytest.raises(ValueError, match=rf"{name} holds no weights of ViT-S-32 \(.+\); wanted a file"):
        load_clip("ViT-S-32", str(tmp_path / name))


def test_weights_that_would_run_code_are_refused(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"state_dict": Touch()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt holds no weights"):
        load_clip("ViT-S-32", str(tmp_path / "evil.pt"))
    assert not (tmp_path / "ran").exists()
