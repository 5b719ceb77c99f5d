"""The tiny CLIP's words and files, text embeddings by hand, and what open_clip models need a network for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import WORDS, small_clip
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.testing import assert_close
from toys import same

from sptseg.model import clip as clips
from sptseg.model.clip import WordTokenizer, fingerprint, load_clip, new_tiny_clip, save_tiny_clip, usable_models

TOKENIZER = WordTokenizer(WORDS, context_length=8)


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
    assert torch.equal(TOKENIZER(["A Tree,water"]), TOKENIZER(["a tree water"]))


def test_the_tiny_clip_comes_back_from_its_file(tmp_path: Path) -> None:
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


def test_embedded_files_are_found_in_a_wheel_and_in_a_clone_or_missed_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(clips, "__file__", str(tmp_path / "sptseg" / "model" / "clip.py"))
    with pytest.raises(FileNotFoundError, match=r"the embedded file tiny_clip\.safetensors is missing .*reinstall"):
        load_clip()
    for folder in (tmp_path / "data", tmp_path / "sptseg" / "data"):  # the wheel's counts first
        folder.mkdir(parents=True)
        (folder / "x").touch()
        assert clips.data_file("x") == folder / "x"


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
def test_models_that_do_not_go_are_refused_before_anything_is_built(
    name: str, tag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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
