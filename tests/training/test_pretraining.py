"""Losses equal to plain loops, the fast encoders to open_clip's, and two steps of the real thing."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import WORDS, small_clip
from torch import Tensor
from torch.testing import assert_close
from toys import same

from sptseg import scenes
from sptseg.datasets import IMAGENET_MEAN, IMAGENET_STD
from sptseg.model import Clip, WordTokenizer, load_clip
from sptseg.training import pretraining
from sptseg.training.pretraining import PretrainConfig, Stage, embed_images, embed_texts, pretrain, retrieval
from sptseg.training.state import read_tensors, write_tensors

STAGES = (
    Stage(("thumbnail",), 32, 8, 4, (1e-3, 1e-4)),
    Stage(("scene", "closeup"), 64, 8, 4, (1e-4, 0.0), patch_dropout=0.0, local_window=4),
)
CONFIG = PretrainConfig(stages=STAGES, pool=8, threads=1)
SCALE = torch.tensor(7.0)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads instead of new processes, which take seconds to start."""
    monkeypatch.setattr(pretraining, "ProcessPoolExecutor", lambda threads, _: ThreadPoolExecutor(threads))


def speaking_clip(words: tuple[str, ...] = scenes.WORDS) -> Clip:
    """The small CLIP, trainable, with all words of the scenes."""
    clip: Any = small_clip()
    clip.model.requires_grad_(True)
    clip.model.token_embedding = torch.nn.Embedding(len(words) + 3, 32)
    return replace(clip, tokenizer=WordTokenizer(words, context_length=12))


def units(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def test_embeddings_equal_open_clips_own() -> None:
    """With and without gradients; the patches too; also of texts of different lengths, which share the longest's."""
    clip, texts = small_clip(), ["tree", "a photo of a boat", "", " ".join(WORDS)]
    images = torch.randn(2, 3, 32, 32)
    clip.visual.output_tokens = True
    pooled, tokens = clip.visual(images)
    clip.model.requires_grad_(True)
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            patches, image = embed_images(clip, images)
        assert_close(image, F.normalize(pooled, dim=-1), atol=1e-5, rtol=1e-5)
        assert_close(patches, F.normalize(tokens @ clip.visual.proj, dim=-1), atol=1e-5, rtol=1e-5)
    assert embed_images(clip, images, dropout=0.75)[0].shape == (2, 16, 32)
    assert_close(embed_texts(clip, texts), clip.model.encode_text(clip.tokenizer(texts), normalize=True))


def test_embed_images_in_windows_equals_pictures_cut_into_them() -> None:
    """Each patch says what it would in a picture of its window alone, at its own place; image embeddings row by row."""
    clip, images = small_clip(), torch.randn(2, 3, 32, 32)
    state = clip.model.state_dict()
    patches, image = embed_images(clip, images, window=4)
    name = "visual.positional_embedding"
    token, grid = state[name][:1], state[name][1:].unflatten(0, (8, 8))
    for i, (y, x) in enumerate(((0, 0), (0, 4), (4, 0), (4, 4))):
        window = small_clip(image_size=16)
        positions = torch.cat([token, grid[y : y + 4, x : x + 4].flatten(0, 1)])
        window.model.load_state_dict({**state, name: positions})
        cut = images[..., 4 * y : 4 * y + 16, 4 * x : 4 * x + 16]
        expected_patches, expected = embed_images(window, cut)
        found = patches.unflatten(1, (8, 8))[:, y : y + 4, x : x + 4].flatten(1, 2)
        assert_close(found, expected_patches, atol=1e-5, rtol=1e-5)
        assert_close(image[i::4], expected, atol=1e-5, rtol=1e-5)


def test_contrast_is_the_mean_of_both_directions() -> None:
    a, b = units(5, 8), units(5, 8)
    odds = (7 * a @ b.T).exp()
    expected = -((odds / odds.sum(0)).diag().log() + (odds / odds.sum(1)[:, None]).diag().log()).mean() / 2
    assert_close(pretraining.contrast(a, b, SCALE), expected)


@pytest.mark.parametrize("coverage", [0.01, 0.3, 1.0])
def test_dense_loss_by_loops(coverage: float) -> None:
    log_p = torch.randn(3, 6, 4).log_softmax(dim=-1)
    present = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    own, won = [], []
    for picture, here in zip(log_p, present, strict=True):  # (patches, nouns)
        own += [math.log(row[here].exp().sum()) for row in picture]
        won += [float(of_noun.topk(math.ceil(coverage * 6)).values.mean()) for of_noun in picture.T[here]]
    expected = -np.mean(own) - np.mean(won)
    assert float(pretraining.dense_loss(log_p, present, coverage)) == pytest.approx(expected, rel=1e-5)


def test_local_losses_by_loops() -> None:
    """The window's choice among the caption's nouns is the target, and no gradient goes through it."""
    log_p, local = (torch.randn(2, 5, 3).log_softmax(dim=-1).requires_grad_() for _ in range(2))
    present = torch.tensor([[1, 0, 1], [0, 1, 0]], dtype=torch.bool)
    losses = pretraining.local_losses(log_p, local, present, 0.3)
    odds = local.exp() * present[:, None]
    assert_close(losses["taught"], -(odds / odds.sum(-1, keepdim=True) * log_p).sum(-1).mean())
    assert_close(losses["local"], pretraining.dense_loss(local, present, 0.3))
    gradients = torch.autograd.grad(losses["taught"], [log_p, local], allow_unused=True)
    assert gradients[0].count_nonzero() > 0 and gradients[1] is None


def test_phrase_loss_by_loops() -> None:
    patches, phrases = units(3, 6, 8), units(4, 8)
    owner = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 1, 1], [0, 0, 1]], dtype=torch.bool)
    expected = []
    for phrase, owns in zip(phrases, owner, strict=True):
        similarity = 7 * patches @ phrase  # (pictures, patches)
        odds = (similarity.softmax(dim=1) * similarity).sum(dim=1).exp()
        expected.append(-math.log(odds[owns].sum() / odds.sum()))
    found = float(pretraining.phrase_loss(patches, phrases, owner, SCALE))
    assert found == pytest.approx(np.mean(expected), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("dense", "stage", "names"),
    [
        (False, STAGES[1], {"image"}),
        (True, STAGES[0], {"image", "mean_patch", "dense", "phrase"}),
        (True, STAGES[1], {"image", "mean_patch", "dense", "phrase", "local", "taught"}),
    ],
)
def test_caption_losses_reach_every_part(dense: bool, stage: Stage, names: set[str]) -> None:
    """Image, text and scale get gradients; the control has CLIP's contrast only."""
    clip, rng = speaking_clip(), np.random.default_rng(0)
    phrases = [("a red boat", "water"), ("green grass", "a big tree"), ("a boat",)]
    losses = pretraining.caption_losses(clip, stage, torch.randn(3, 3, 32, 32), phrases, rng, dense)
    assert set(losses) == names
    torch.stack(list(losses.values())).sum().backward()
    for name in ("visual.conv1.weight", "text_projection", "logit_scale"):
        gradient = clip.model.get_parameter(name).grad
        assert gradient is not None and gradient.any()


def test_batches_are_normalised_mirrored_at_random_and_cover_the_pool() -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), np.uint8)
    phrases = [(f"{i}", f"{i} b", f"{i} c") for i in range(8)]
    source = pretraining.batches(images, phrases, 4, np.random.default_rng(0))
    upright = (torch.from_numpy(images) / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    seen, mirrored = [], []
    for pictures, words in (next(source) for _ in range(4)):
        for picture, of in zip(pictures.permute(0, 2, 3, 1), words, strict=True):
            seen.append(int(of[0].split()[0]))
            assert sorted(of) == sorted(phrases[seen[-1]])
            mirrored.append(not torch.allclose(picture, upright[seen[-1]], atol=1e-5))
            assert_close(picture.flip(1) if mirrored[-1] else picture, upright[seen[-1]], atol=1e-5, rtol=1e-5)
    assert sorted(seen[:8]) == sorted(seen[8:]) == list(range(8)) and seen[:8] != seen[8:]
    assert 0 < sum(mirrored) < 16


@pytest.mark.usefixtures("in_this_process")
def test_retrieval_counts_scenes_whose_own_caption_is_the_closest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five captions two are exchanged; and the tiny CLIP knows nearly all of a hundred."""
    right = torch.eye(5)
    monkeypatch.setattr(pretraining, "embed_images", lambda *_: (None, right))
    monkeypatch.setattr(pretraining, "embed_texts", lambda *_: right[[1, 0, 2, 3, 4]])
    assert retrieval(load_clip(), groups=2, pictures=5) == 0.6
    monkeypatch.undo()
    assert retrieval(load_clip(), groups=1) > 0.95


@pytest.mark.slow
def test_a_pool_is_drawn_by_processes_from_seed_stage_and_number() -> None:
    images, phrases = pretraining.draw_pool(STAGES[1], replace(CONFIG, seed=5, pool=3, threads=2), 1)
    assert images.shape == (3, 64, 64, 3)
    for i, kind in enumerate(("scene", "closeup", "scene")):
        expected = scenes.compose((pretraining.STREAM, 5, 1, i), 64, kind)
        assert np.array_equal(images[i], expected.image) and phrases[i] == expected.phrases


def test_a_short_run_keeps_the_stages_and_the_control_has_clips_own_contrast_and_no_local_stage() -> None:
    plain, full = PretrainConfig.plain(seed=3), PretrainConfig()
    assert plain == replace(full, seed=3, stages=full.stages[:3], dense_losses=False)
    assert [stage.local_window for stage in full.stages] == [0, 0, 0, 4]
    total = sum(stage.images for stage in full.stages)
    short = full.scaled(total // 100)
    assert [stage.images for stage in short.stages] == [round(stage.images / 100) for stage in full.stages]
    assert [replace(s, images=0) for s in short.stages] == [replace(s, images=0) for s in full.stages]
    assert all(stage.images >= stage.batch for stage in full.scaled(1000).stages), "one batch at least"


@pytest.mark.usefixtures("in_this_process")
def test_pretraining_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped when the second stage begins, it draws that stage's pictures only; what it writes loads."""
    whole = pretrain(CONFIG, tmp_path / "whole.safetensors").model.state_dict()
    draw, numbers, output = pretraining.draw_pool, [], tmp_path / "clip.safetensors"
    first = pretrain(replace(CONFIG, stages=STAGES[:1]), output).model.state_dict()
    kept: Any = read_tensors(output.with_suffix(".state"))
    assert kept["step"] == 2 and same(kept["model"], first)
    settings = read_tensors(tmp_path / "whole.state")["config"]
    write_tensors(output.with_suffix(".state"), {**kept, "config": settings})
    monkeypatch.setattr(pretraining, "draw_pool", lambda *given: numbers.append(given[2]) or draw(*given))
    second = pretrain(CONFIG, output).model.state_dict()
    assert numbers == [1] and read_tensors(output.with_suffix(".state"))["step"] == 4
    change = (second["visual.proj"] - first["visual.proj"]).abs().max()
    assert 0 < change < 1e-3, "two small steps from where it stopped, no new start"
    assert same(pretrain(CONFIG, output).model.state_dict(), second) and numbers == [1]
    loaded = load_clip("tiny", str(output)).model.state_dict()
    assert all(torch.equal(loaded[name], value.half().float()) for name, value in second.items())
    with pytest.raises(ValueError, match=r"clip\.state is of a run with other settings"):
        pretrain(replace(CONFIG, seed=9), output)
    with pytest.raises(ValueError, match="device is 'abacus', which cannot be used here .*; use cpu"):
        pretrain(replace(CONFIG, device="abacus"), output)
    repeated = pretrain(CONFIG, tmp_path / "repeated.safetensors").model.state_dict()
    assert same(repeated, whole), "made again from its seed"


@pytest.mark.usefixtures("in_this_process")
def test_every_fiftieth_step_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining, "new_tiny_clip", speaking_clip)
    config = replace(CONFIG, stages=(Stage(("thumbnail",), 32, 100, 1, (1e-3, 1e-4)),), pool=2)
    pretrain(config, tmp_path / "clip.safetensors")
    rows = [json.loads(line) for line in (tmp_path / "clip.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [50, 100]
    assert set(rows[0]) == {"step", "stage", "seconds", "lr", "image", "mean_patch", "dense", "phrase"}
    expected = 50 / 500 * (1e-4 + 9e-4 * (0.5 + 0.5 * math.cos(math.pi * 49 / 100)))
    assert rows[0]["lr"] == pytest.approx(expected), "warm-up times half a cosine"
