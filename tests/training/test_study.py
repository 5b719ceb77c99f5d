"""A study from one file, end to end and small; its intervals and rules by hand; its spoilt and gray pictures."""

import hashlib
import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import refused
from filelock import FileLock
from torch import Tensor

from sptseg.cli import main
from sptseg.datasets import Corrupted, Pool, Scenes, Split, corrupt
from sptseg.model import EMBEDDED_CLIPS
from sptseg.scenes.textures import STUFF, gray_tiles
from sptseg.training import Plan, Study, interval, loop
from sptseg.training.ablation import RESULT
from sptseg.training.report import flat

SMALL = {"base": "spt", "image_size": [64, 64], "decoder_layers": 1, "prompt_tokens": 2}
PLAN: dict[str, Any] = {
    "scenes": {"train": [8, 0], "validation": [2, 500], "test": [3, 1000]},
    "train": {"precision": "no", "validate_every": 2, "validation_images": 2, "save_every": 1, "batch_size": 2},
    "rates": [1e-3, 1e-2], "given_rates": {"without": 2e-3}, "choosing_steps": 1, "choosing_seed": 100,
    "rows": {"read": {"base": "dense-clip"}, "with": SMALL, "without": {**SMALL, "spectral_layers": []}},
    "parts": [
        {"question": "a", "clip": "tiny", "rows": ["read", "with"], "seeds": [0, 1], "steps": 3, "corrupted": True},
        {"question": "f", "clip": "tiny", "rows": ["without"], "seeds": [0], "steps": 3, "one_colour": True},
    ],
    "pairs": [["b", "with", "with, S off"], ["a", "with", "read"]],
    "after": {"S off": {"rows": ["with"], "without_spectral_prompts": True}},
}  # fmt: skip


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(PLAN))
    return file


def results(folder: Path) -> dict[str, Any]:
    """What bits each run has left: its rate, scores, curve, spectra, and a hash of the trained weights."""
    found = {}
    for file in sorted(folder.rglob(RESULT)):
        result, weights = json.loads(file.read_text()), file.with_name("model.safetensors")
        kept = [result[name] for name in ("rate", "scores", "curve")] + [result.get("spectra")]
        digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else ""
        found[str(file.parent.relative_to(folder))] = kept, digest
    return found


def test_a_plan_is_run_by_two_shares_stopped_and_gone_on_with_to_the_same_bits(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["ablate", "--plan", str(plan), "--device", "cpu", "--output"]
    one, two = tmp_path / "one", tmp_path / "two"
    main([*command, str(one)])
    tables = (one / "tables.md").read_text()
    assert "0 runs are left" in tables and "| with | " in tables and "## tiny, one-colour, 3 steps" in tables
    runs = results(one)
    assert set(runs) == {
        "tiny/scenes/read/0-steps-seed-0", "tiny/one-colour/without/3-steps-seed-0",
        *(f"tiny/scenes/with/{kind}" for kind in ("rate-0.001", "rate-0.01", "3-steps-seed-0", "3-steps-seed-1")),
    }  # fmt: skip
    chosen = {rate: json.loads((one / f"tiny/scenes/with/rate-{rate}" / RESULT).read_text()) for rate in (1e-3, 1e-2)}
    record = json.loads((one / "record.json").read_text())
    rows = {row["row"]: row for row in record["rows"]}
    assert rows["with"]["rate"] == max(chosen, key=lambda rate: chosen[rate]["scores"]["hiou"])
    assert rows["without"]["rate"] == 2e-3, "given, so nothing was run to choose it"
    assert rows["with"]["seeds"] == [0, 1] and [*rows["with"]["curve"]] == ["2", "3"]
    assert len(rows["with"]["spectra"]["gain_low"]) == 2
    pair = {pair["pictures"]: pair for pair in record["pairs"] if pair["other"] == "read"}
    assert set(pair) == {"test", "blur", "noise", "jpeg", "contrast", "colour", "all spoilt"}
    means = {name: np.mean([score["miou_seen"] for score in rows[name]["scores"]]) for name in ("with", "read")}
    assert pair["test"]["miou_seen"][0] == pytest.approx(means["with"] - means["read"])
    spoilt = {name: rows[name]["spoilt"]["jpeg"]["miou_seen"] for name in ("with", "read")}
    assert pair["jpeg"]["miou_seen"][0] == pytest.approx(spoilt["with"] - spoilt["read"])

    steps, original = iter(range(99)), loop.step

    def stopped(*arguments: Any) -> Any:
        if next(steps) == 5:  # amid a run
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(loop, "step", stopped)
        main([*command, str(two)])
    assert list(two.rglob("state.pt")) and not (two / "tables.md").exists()
    for share in ("1/2", "2/2"):
        main([*command, str(two), "--share", share])
    assert results(two) == runs
    for file in two.rglob(RESULT):  # as a version wrote it that had fewer fields
        result = json.loads(file.read_text())
        del result["asked"]["model"]["window_stride"], result["asked"]["model"]["bicubic"]
        file.write_text(json.dumps(result))
    before = [(file, file.stat().st_mtime_ns) for file in sorted(two.rglob(RESULT))]
    main([*command, str(two)])
    assert (two / "tables.md").read_text() == tables
    more = {**PLAN["after"], "offset 0": {"rows": ["with"], "seen_offset": 0.0}}
    plan.write_text(json.dumps({**PLAN, "after": more, "pairs": [*PLAN["pairs"], ["b", "with", "with, offset 0"]]}))
    capsys.readouterr()
    main([*command, str(two), "--minutes", "0"])
    said = capsys.readouterr().out
    assert "Not scored, as the plan did not ask for it when these runs ended: offset 0 of tiny/scenes/with/3-s" in said
    assert said.endswith(tables[tables.index("\n## ") :] + "\n"), "all else is there"
    assert before == [(file, file.stat().st_mtime_ns) for file in sorted(two.rglob(RESULT))], "nothing is run again"
    plan.write_text(json.dumps({**PLAN, "scenes": {**PLAN["scenes"], "test": [4, 1000]}}))
    with pytest.raises(ValueError, match="other settings of scenes.test; choose another output folder"):
        Study(Plan.read(plan), two).work((1, 1), math.inf, print)


def test_time_limits_end_the_work_and_faulty_plans_are_refused(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    assert not Study(Plan.read(plan), plan.parent).work((1, 1), time.monotonic() + 0.1, said.append)
    assert "runs are left, the first tiny/scenes/" in said[-1]
    command = ["ablate", "--device", "cpu", "--output", plan.parent, "--plan", plan]
    for share in ("3/2", "0/1", "half"):
        assert "wanted I/N with I from 1 to N" in refused(capsys, *command, "--share", share)
    nobody = {"parts": [{**PLAN["parts"][0], "rows": ["nobody"]}]}
    for change, fault in ((nobody, "names the rows nobody"), ({"given_rates": {"with": "fast"}}, "is no plan of a")):
        plan.write_text(json.dumps({**PLAN, **change}))
        assert fault in refused(capsys, *command)


def test_the_plan_of_the_project_can_be_read() -> None:
    plan = Plan.read(Path(__file__).parents[2] / "data" / "study.json")
    known = {*plan.rows} | {f"{row}, {name}" for name, after in plan.after.items() for row in after.rows}
    assert {row for _, *both in plan.pairs for row in both} <= known
    assert {part.clip for part in plan.parts} <= set(EMBEDDED_CLIPS)


def counted(*hits: int) -> Tensor:
    """Pictures (P, 1, 3, 2), of one data set, with ten pixels of each class, of which so many of the first and five of
    the second are right, and none of another class's."""
    return torch.tensor([[[[a, 5], [10, 10], [a, 5]]] for a in hits])


def test_an_interval_over_seeds_and_pictures_by_hand() -> None:
    """Mine less other, lower end, upper end; a quarter of the draws holds one of two seeds (or pictures) only."""
    split = Split.from_names("two", ["grass", "boat"], unseen=["boat"])
    mine, other = torch.stack([counted(3), counted(6)]), torch.stack([counted(2), counted(3)])  # two seeds, a picture
    ends = interval(mine, other, split)  # mIoU(S) 0.3 less 0.2, and 0.6 less 0.3
    assert ends["miou_seen"] == pytest.approx([0.2, 0.1, 0.3]) == ends["gap"]
    assert ends["miou_unseen"] == [0, 0, 0]
    mine, other = counted(6, 4)[None], counted(2, 4)[None]  # a seed, two pictures
    assert interval(mine, other, split)["miou_seen"] == pytest.approx([0.2, 0.0, 0.4])  # pooled 10/20 less 6/20
    mine, other = torch.cat([mine, other], dim=2), torch.cat([other, other], dim=2)  # the mean over two data sets
    assert interval(mine, other, split)["miou_seen"] == pytest.approx([0.1, 0.0, 0.2])


def test_shares_keep_to_their_locks_and_pools_their_pictures(plan: Path, tmp_path: Path) -> None:
    study = Study(Plan.read(plan), tmp_path)
    trial = study.plan.trials()[0]
    with FileLock(tmp_path / trial.place / "lock"):
        assert not study.tried(trial, pytest.fail)
    scenes = Scenes(3, 7, "training")
    for pool in (Pool(scenes, tmp_path / "a.npy"), Pool(scenes, tmp_path / "a.npy")):
        assert len(pool) == 3 and pool.names == scenes.names
        for i in range(3):
            assert pool[i]["name"] == scenes[i]["name"]
            assert all(torch.equal(pool[i][part], scenes[i][part]) for part in ("image", "label"))
    with pytest.raises(ValueError, match=r"a.npy holds 3 pictures; wanted 4"):
        Pool(Scenes(4, 7, "training"), tmp_path / "a.npy")


def test_flat_is_half_a_point_in_500_steps() -> None:
    curve = {250: 0.10, 500: 0.12, 750: 0.124, 1000: 0.1249, 1250: 0.1289}
    assert flat(curve) == 1000  # 750: 0.124 is above 0.10 + 0.005; 1000: 0.1249 is below 0.12 + 0.005
    assert flat({**curve, 1250: 0.13}) is None and flat({250: 0.1, 500: 0.1}) is None and flat({}) is None


@pytest.mark.parametrize("kind", ["blur", "noise", "jpeg", "contrast", "colour"])
def test_pictures_are_spoilt_the_more_the_stronger(kind: Any) -> None:
    scenes = Scenes(2)
    image = scenes[1]["image"].permute(1, 2, 0).numpy()
    spoilt = [corrupt(image, kind, strength, seed=1) for strength in (1, 2, 3)]
    errors = [np.abs(each.astype(float) - image).mean() for each in spoilt]
    assert 1 < errors[0] < errors[1] < errors[2] < 80 and all(each.dtype == np.uint8 for each in spoilt)
    if kind == "contrast":  # 0.7 of each distance from the mean, by hand
        mean = image.reshape(-1, 3).mean(0)
        assert np.abs(spoilt[0] - (mean + 0.7 * (image - mean))).max() <= 0.51
    dataset = Corrupted(scenes, kind, 2)
    assert torch.equal(dataset[1]["label"], scenes[1]["label"]) and dataset.names[1] == f"evaluation-0-1-{kind}-2"
    assert np.array_equal(dataset[1]["image"].permute(1, 2, 0), spoilt[1])


def test_scenes_of_one_colour_have_the_same_masks_and_gray_stuff_of_one_contrast() -> None:
    for name in STUFF:
        tile = gray_tiles(name)[:, 0].astype(float)
        assert tile.mean((1, 2)) == pytest.approx(np.ones(4), abs=1e-4)
        assert tile.std((1, 2)) == pytest.approx(np.full(4, 0.2), abs=1e-4)
    gray, usual = Scenes(20, one_colour=True), Scenes(20)
    saturations = []
    for i in range(20):
        assert torch.equal(gray[i]["label"], usual[i]["label"])
        pixels = [each[i]["image"][:, gray[i]["label"] < len(STUFF)].float() for each in (gray, usual)]
        saturations.append([float((each.amax(0) - each.amin(0)).mean()) for each in pixels])
    assert np.mean(saturations, axis=0)[0] < 0.3 * np.mean(saturations, axis=0)[1]
    assert set(gray.names).isdisjoint(usual.names)
