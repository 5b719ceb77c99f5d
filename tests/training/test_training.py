"""Schedules by hand; a stopped run goes on with the same bits; micro-batches and processes change nothing."""

import json
import math
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from toys import SPLIT, ActsAt, Toys, same, toy_config, toy_model

from sptseg.checkpoints.checkpoint import load_model, read_header
from sptseg.datasets import IGNORE, Augmentation
from sptseg.inference import evaluate, scores, segment
from sptseg.model import SptSeg
from sptseg.training import TrainConfig, fit, learning_rate, parameter_groups, pseudo_labels, segmentation_loss
from sptseg.training.config import training_augmentation
from sptseg.training.state import read_tensors, write_tensors
from sptseg.training.stream import TrainingStream, label_table

PLAIN = Augmentation(crop=32, resize_base=(128, 32), scale=(1, 1), largest_share=1, distortion=0)


def test_the_learning_rate_by_hand() -> None:
    config = TrainConfig(iterations=100, warmup=10, learning_rate=0.1, last_rate=0.01, power=2.0)
    expected = {0: 0.1 * 1e-6, 5: 0.5000005 * (0.09 * 0.95**2 + 0.01), 10: 0.09 * 0.9**2 + 0.01, 99: 0.09 * 1e-4 + 0.01}
    assert {i: learning_rate(config, i) for i in expected} == pytest.approx(expected)
    rates = [learning_rate(TrainConfig(), i) for i in (0, 1500, 19_999)]  # the protocol's
    assert rates == pytest.approx([2e-10, (2e-4 - 1e-6) * (1 - 0.075) ** 0.9 + 1e-6, 1e-6], rel=0.05)
    assert learning_rate(toy_config(warmup=0), 0) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("changes", "count"), [({}, 10), ({"start": "dense_clip"}, 6), ({"decoder": "cross_attention"}, 10)]
)
def test_norms_do_not_decay_and_every_trained_parameter_is_in_one_group(changes: dict, count: int) -> None:
    model = toy_model(**changes)
    decayed, free = parameter_groups(model, 0.01)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [names[id(p)] for group in (decayed, free) for p in group["params"]]
    assert sorted(grouped) == sorted(model.trained_state()) and "visual" not in " ".join(grouped)
    norms = {name for name in model.trained_state() if ".norm_" in name or ".prompt_norm." in name}
    assert {names[id(p)] for p in free["params"]} == norms
    assert len(norms) == count, "after the encoder, two in each layer but the last (dense_clip: no bias)"


def test_pseudo_labels_by_hand() -> None:
    """Classes 1 and 3 are unseen; the best of all is a seen one, which is not asked."""
    logits = torch.tensor([[9.0, 9, 9], [1, 5, 2], [9, 9, 9], [2, 4, 3]])[None, :, None]  # (1, 4, 1, 3)
    labels = torch.tensor([[[-1, -1, 2]], [[255, -1, -1]]])
    found = pseudo_labels(logits.expand(2, -1, -1, -1), labels, seen=[0, 2], unseen=torch.tensor([1, 3]))
    assert found.tolist() == [[[3, 1, 2]], [[255, 1, 3]]]
    assert labels.tolist() == [[[-1, -1, 2]], [[255, -1, -1]]]
    for seen, unseen in (([0, 1], [2]), ([0, 1, 2], [2, 3]), ([0, 1, 2], [4])):
        with pytest.raises(ValueError, match="do not make up the 4 classes of the logits; wanted each position once"):
            pseudo_labels(logits, labels, seen, unseen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": {"iterations": 0}}, "iterations is 0; wanted 1 to 1000000000"),
        ({"config": {"learning_rate": 2.0}}, "learning_rate is 2.0; wanted 0 < learning_rate < 1"),
        ({"config": {"setting": "x"}}, "setting is 'x'; wanted one of inductive, transductive, supervised"),
        ({"config": {"tensorboard": True}}, "resume and tensorboard need an output folder"),
        ({"config": {"validate_every": 1}}, "validate_every is set but there is no validation data"),
        ({"model": toy_model(prompt_tokens=0, spectral_layers=(), decoder="none")}, "nothing to train"),
    ],
)
def test_runs_that_do_not_go_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(options.get("model") or toy_model(), Toys(), SPLIT, toy_config(**options.get("config", {})))


@pytest.mark.parametrize("setting", ["inductive", "transductive"])
def test_the_first_step_by_hand(setting: Any) -> None:
    """AdamW on the gradient of the plain loss of the first batch; transductive targets are the model's own."""
    config = toy_config(iterations=1, setting=setting)
    model, expected = toy_model(), toy_model().train()
    asked, table = label_table(SPLIT, setting)
    examples = TrainingStream(Toys(), training_augmentation(model, config), table, 0)
    images, labels = (torch.stack(part) for part in zip(*(examples[p][:2] for p in range(4)), strict=True))
    optimizer = torch.optim.AdamW(parameter_groups(expected, 0.01), lr=1e-3)
    logits = expected(images, expected.class_embeddings(SPLIT.names(asked)))
    if setting == "transductive":
        labels = pseudo_labels(logits, labels, SPLIT.seen, SPLIT.unseen)
        assert {*labels.unique().tolist()} & {*SPLIT.unseen}
    loss = segmentation_loss(logits, labels)
    loss["total"].backward()
    optimizer.step()
    (row,) = fit(model, Toys(), SPLIT, config).history
    assert set(row) == {"iteration", "focal", "ssim", "total", "learning_rate", "images_per_second"}
    assert row["total"] == pytest.approx(loss["total"].item()) == pytest.approx(row["focal"] + row["ssim"])
    assert row["learning_rate"] == learning_rate(config, 0) and row["images_per_second"] > 0
    for name, value in expected.trained_state().items():
        assert_close(model.trained_state()[name], value, msg=name)


def test_accumulated_micro_batches_are_one_batch() -> None:
    """The loss is normalised over all of them: 1 x 8 and 4 x 2 end in the same weights."""
    models = [toy_model(), toy_model()]
    for model, accumulation in zip(models, (1, 4), strict=True):
        fit(model, Toys(), SPLIT, toy_config(batch_size=8, accumulation=accumulation))
    for name, value in models[0].trained_state().items():
        assert_close(models[1].trained_state()[name], value, atol=1e-5, rtol=0, msg=name)
    assert not same(models[0].trained_state(), toy_model().trained_state())


@pytest.mark.parametrize("decoder", ["spectral", "none"])
def test_half_precision_has_nearly_the_same_loss(decoder: str) -> None:
    configs = [toy_config(iterations=2, precision=precision) for precision in ("no", "bf16")]
    full, half = (fit(toy_model(decoder=decoder), Toys(), SPLIT, config).history for config in configs)
    assert half[0]["total"] == pytest.approx(full[0]["total"], rel=0.02)
    assert half[0]["total"] != full[0]["total"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dense_clips_logits_are_exact_in_half_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A certain patch: with cosines 1, 0, 0 times 1 / 0.07, p = 1 - 1.2e-6, which half precision would call 1."""
    model, text, scale = toy_model(decoder="none"), torch.eye(3, 32), 1 / 0.07
    monkeypatch.setattr(model.encoder, "forward", lambda _: (text.T[None, :, :, None].to(dtype), None))
    with torch.autocast("cpu", dtype):
        logits = model(torch.zeros(1, 3, 32, 32), text)[0, :, :, 0]
    least = math.log(1e-6 / (1 - 1e-6))  # for the others' p = 6e-7
    expected = torch.full((3, 3), least).fill_diagonal_(scale - math.log(2))
    assert_close(logits, expected, rtol=0, atol=0.1)  # float32's p is a multiple of 6e-8


def test_what_changes_no_result_may_change_on_resuming(tmp_path: Path) -> None:
    """And a state that is older than a setting goes on with the setting's default; a finished run stays as it is."""
    first = fit(toy_model(), Toys(), SPLIT, toy_config(save_every=5), output=tmp_path, resume=True)
    state = read_tensors(tmp_path / "state.pt")
    asked = json.loads(state["settings"])
    assert asked["model"].pop("readout") == "plain"
    write_tensors(tmp_path / "state.pt", {**state, "settings": json.dumps(asked)})
    other, dataset = toy_config(save_every=1, validate_every=1, validation_images=1), Toys()
    again = fit(toy_model(), dataset, SPLIT, other, output=tmp_path, resume=True, validation=Toys())
    assert dataset.read == [] and again.history == first.history and len(first.history) == 5
    assert same(first.model.trained_state(), again.model.trained_state())


def test_validation_rows(tmp_path: Path) -> None:
    """In the asked rhythm and at the end, also where the history is thinner; of the weights of that moment."""
    config = toy_config(iterations=5, validate_every=2, validation_images=3)
    validation = Toys(5)
    result = fit(toy_model(dropout=0.1), Toys(), SPLIT, config, validation=validation)
    figures = ["pixel_accuracy", "miou_seen", "miou_unseen", "hiou"]
    assert [row["iteration"] for row in result.history if set(figures) <= set(row)] == [2, 4, 5]
    assert validation.read == [0, 1, 2] * 3
    scores = evaluate(result.model, Toys(3), SPLIT, progress=False)
    assert [result.history[-1][name] for name in figures] == [getattr(scores, name) for name in figures]
    plain = fit(toy_model(dropout=0.1), Toys(), SPLIT, toy_config(iterations=5))
    assert same(plain.model.trained_state(), result.model.trained_state()), "looking on changes no weight"


@pytest.fixture(scope="module")
def trained() -> SptSeg:
    config = toy_config(iterations=30, setting="supervised", learning_rate=3e-3)
    result = fit(toy_model(start="dense_clip", selection=False), Toys(), SPLIT, config, augment=PLAIN)
    totals = [row["total"] for row in result.history]
    assert np.mean(totals[-5:]) < 0.8 * np.mean(totals[:5]) and not result.model.training
    assert same(result.model.clip.model.state_dict(), small_clip().model.state_dict()), "no bit of CLIP changes"
    return result.model


@pytest.mark.parametrize(("batch_size", "offset"), [(16, None), (1, 0.0), (3, 2.0)])
@pytest.mark.parametrize("sizes", [((32, 32),), ((40, 70), (32, 32), (90, 33), (20, 20))])
def test_evaluation_equals_plain_labels(trained: SptSeg, sizes: tuple, batch_size: int, offset: float | None) -> None:
    """Segment's scores, picture by picture, lowered for seen classes; one confusion over all labelled pixels. With the
    model's own offset of seen classes, none, and one that moves every pixel to unseen classes."""
    dataset = Toys(7, sizes)
    found = evaluate(trained, dataset, SPLIT, batch_size=batch_size, seen_offset=offset, progress=False)
    assert dataset.read == list(range(7))
    offset = trained.config.seen_offset if offset is None else offset
    confusion, lowered = torch.zeros(5, 5), [offset if i in SPLIT.seen else 0.0 for i in range(5)]
    for i in range(7):
        image, label = dataset[i]["image"].permute(1, 2, 0).numpy(), dataset[i]["label"]
        result = segment(trained, image, SPLIT.classes)
        best = (np.stack([result.scores(name) for name in SPLIT.classes], axis=-1) - lowered).argmax(axis=-1)
        np.add.at(confusion.numpy(), (label[label != IGNORE].numpy(), best[label != IGNORE]), 1)
    expected = scores(confusion, SPLIT)
    assert found.summary() == pytest.approx(expected.summary(), abs=1e-3)  # rounding may turn a few pixels
    assert found.miou_seen == 0 if offset == 2.0 else 0.2 < expected.pixel_accuracy < 1


def signalled_at(number: int, *reads: int) -> ActsAt:
    """Sends this process a signal when its n-th picture is read, and when any of some later ones is."""
    return ActsAt(lambda: os.kill(os.getpid(), number), *reads)


@settings(deadline=None, max_examples=3)
@given(read=st.integers(0, 4 * 8 - 1), save_every=st.sampled_from([0, 3]), accumulation=st.sampled_from([1, 2]))
def test_sigterm_at_any_moment_costs_no_bit(read: int, save_every: int, accumulation: int) -> None:
    """The iteration ends, the state is saved, whatever save_every is; the resumed run ends in the same weights."""
    config = toy_config(iterations=8, save_every=save_every, accumulation=accumulation, warmup=3)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    whole = fit(toy_model(dropout=0.1), Toys(), SPLIT, config)
    with TemporaryDirectory() as name:
        folder, dataset = Path(name), signalled_at(signal.SIGTERM, read)
        done = read // 4 + 1
        if done < 8:
            with pytest.raises(SystemExit) as stopped:
                fit(toy_model(dropout=0.1), dataset, SPLIT, config, output=folder)
            assert stopped.value.code == 143 and len(dataset.read) == 4 * done
            assert not (folder / "model.safetensors").exists()
        else:
            fit(toy_model(dropout=0.1), dataset, SPLIT, config, output=folder)
        torch.manual_seed(read)
        rest = Toys()
        resumed = fit(toy_model(dropout=0.1), rest, SPLIT, config, output=folder, resume=True)
        assert len(rest.read) == 4 * (8 - done) or (done == 8 and not save_every and len(rest.read) == 32)
        assert same(resumed.model.trained_state(), whole.model.trained_state())
        assert [row["total"] for row in resumed.history] == [row["total"] for row in whole.history]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_one_interrupt_saves_and_two_do_not_wait(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = toy_config(iterations=4)
    with pytest.raises(KeyboardInterrupt):
        fit(toy_model(), signalled_at(signal.SIGINT, 5), SPLIT, config, output=tmp_path / "one")
    said = f"stopped by SIGINT after iteration 2 of 4; the state is in {tmp_path / 'one'}: go on with resume=True"
    assert said in capsys.readouterr().err
    dataset = signalled_at(signal.SIGINT, 5, 6)
    with pytest.raises(KeyboardInterrupt):
        fit(toy_model(), dataset, SPLIT, config, output=tmp_path / "two")
    assert len(dataset.read) == 6 and not (tmp_path / "two" / "state.pt").exists()


def test_a_run_in_another_thread_leaves_signals_alone(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(fit, toy_model(), Toys(), SPLIT, toy_config(iterations=2), output=tmp_path).result()
    assert len(result.history) == 2


def test_loading_processes_do_not_get_the_groups_signals(tmp_path: Path) -> None:
    """A launcher signals the whole group; were the loading processes to end, so would the iteration."""

    class Grouped(Toys):
        def __getitem__(self, index: int) -> Any:
            (tmp_path / f"{os.getpgrp()}-{os.getpid()}").touch()
            return super().__getitem__(index)

    fit(toy_model(), Grouped(), SPLIT, toy_config(iterations=2, workers=1))
    (file,) = tmp_path.iterdir()
    group, process = file.name.split("-")
    assert group == process != str(os.getpid())


def test_the_folder_of_a_run_and_its_half_way_checkpoint(tmp_path: Path) -> None:
    clip, folder, config = small_clip(), tmp_path / "a" / "run", toy_config(save_every=2)
    result = fit(toy_model(clip), Toys(), SPLIT, config, output=folder, about={"preset": "toys"})
    kept = {"model.safetensors", "halfway.safetensors", "history.json", "config.json", "state.pt"}
    assert {file.name for file in folder.iterdir()} == kept
    assert json.loads((folder / "history.json").read_text()) == result.history
    stored, about = json.loads((folder / "config.json").read_text()), read_header(folder / "model.safetensors")["about"]
    assert stored["model"]["prompt_tokens"] == 2 and stored["split"]["classes"] == list(SPLIT.classes)
    known = {"split": "toys", "seen": ["grass", "water", "tree"], "unseen": ["boat", "house"], "preset": "toys"}
    assert about == {**known, "train": stored["train"]} and stored["train"]["iterations"] == 5
    assert same(load_model(folder, clip).trained_state(), result.model.trained_state())
    with pytest.raises(SystemExit):
        fit(toy_model(clip), signalled_at(signal.SIGTERM, 7), SPLIT, config, output=tmp_path / "b")
    halfway, stopped = (load_model(each / "halfway.safetensors", clip) for each in (folder, tmp_path / "b"))
    assert halfway.about["iteration"] == 2 and same(halfway.trained_state(), stopped.trained_state())
    assert not same(halfway.trained_state(), result.model.trained_state())
    fit(halfway, Toys(), SPLIT, toy_config(setting="transductive", iterations=2), output=tmp_path / "c")
    assert not (tmp_path / "c" / "halfway.safetensors").exists()


class Named(Toys):
    def __init__(self, *names: str) -> None:
        super().__init__(len(names))
        self.names = names


@pytest.mark.parametrize(
    ("train", "model", "pictures", "named"),
    [
        ({"learning_rate": 2e-3, "seed": 1}, {}, "ab", "train.learning_rate, train.seed"),
        ({}, {"loss": "zegclip", "decoder_layers": 2}, "ab", "model.decoder_layers, model.loss"),
        ({}, {}, "ba", "data.names"),
        ({}, {}, "abc", "data.pictures, data.names"),
    ],
)
def test_states_of_other_runs_are_refused(train: dict, model: dict, pictures: str, named: str, tmp_path: Path) -> None:
    fit(toy_model(), Named("a", "b"), SPLIT, toy_config(save_every=5), output=tmp_path)
    before, config = (tmp_path / "config.json").read_text(), toy_config(save_every=5, **train)
    with pytest.raises(ValueError, match=f"trained with other settings of {named}; resume with the same, or"):
        fit(toy_model(**model), Named(*pictures), SPLIT, config, output=tmp_path, resume=True)
    assert (tmp_path / "config.json").read_text() == before
