"""Two processes (gloo) against one: the same metrics exactly, the same weights, pictures once each, stops agreed on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from toys import SPLIT, Toys, toy_config, toy_model

from sptseg.inference.evaluation import evaluate
from sptseg.training.loop import fit
from sptseg.training.state import STATE, read_sealed

pytestmark = pytest.mark.slow
ODD = {"length": 5, "sizes": ((32, 32), (40, 33))}
RUNS: dict[str, dict[str, Any]] = {
    "whole": {"iterations": 20},
    "accumulated": {"iterations": 20, "accumulation": 2},
    "transductive": {"setting": "transductive"},
}
SCRIPT = """
import json, os, signal, sys
folder, here, runs, odd = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
sys.path.insert(0, here)
import torch
torch.set_num_threads(1)
from accelerate import PartialState
from toys import SPLIT, Toys, toy_config, toy_model
from sptseg.inference.evaluation import evaluate
from sptseg.training.loop import fit

histories = {name: fit(toy_model(), Toys(), SPLIT, toy_config(**run), output=f"{folder}/{name}").history
             for name, run in runs.items()}
state = PartialState()
assert state.num_processes == 2, state
rank = state.process_index
pictures = Toys(**odd)
scores = evaluate(toy_model(), pictures, SPLIT, progress=False).as_dict()

class Stopped(Toys):
    def __getitem__(self, index):
        if rank == 1 and len(self.read) == 5:  # in the third iteration, on one process only
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)

config = toy_config(iterations=6)
try:
    fit(toy_model(dropout=0.1), Stopped(), SPLIT, config, output=folder + "/stopped")
    code = 0
except SystemExit as error:
    code = error.code
rest = Toys()
fit(toy_model(dropout=0.1), rest, SPLIT, config, output=folder + "/stopped", resume=True)
fit(toy_model(dropout=0.1), Toys(), SPLIT, config, output=folder + "/unstopped")

class Holes(Toys):
    def __getitem__(self, index):
        if rank == 1 and index % 2:  # on one process only
            raise OSError("an odd picture")
        return super().__getitem__(index)

fit(toy_model(), Holes(), SPLIT, toy_config(skip_unreadable=True, save_every=2), output=folder + "/holes")
found = {"histories": histories, "scores": scores, "read": pictures.read, "code": code, "rest": len(rest.read)}
open(f"{folder}/{rank}.json", "w").write(json.dumps(found))
state.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes did, launched once for all tests."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "script.py").write_text(SCRIPT)
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, here.parents[:2]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "script.py"]
    command = [*launch, str(folder), str(here), json.dumps(RUNS), json.dumps(ODD)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("stopped by SIGTERM after iteration 3 of 6; the state is in ") == 1
    return folder


def found(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_evaluation_counts_each_of_an_odd_number_of_pictures_once(two: Path) -> None:
    expected = evaluate(toy_model(), Toys(**ODD), SPLIT, progress=False).as_dict()
    assert sorted(index for each in found(two) for index in each["read"]) == [0, 1, 2, 3, 4]
    assert [each["scores"] for each in found(two)] == [expected, expected]


@pytest.mark.parametrize("name", RUNS)
def test_training_is_one_processs_with_the_whole_batch(name: str, two: Path, tmp_path: Path) -> None:
    """Micro-batches too: two processes of two each are one batch of one process; transductive labels are per batch."""
    alone = fit(toy_model(), Toys(), SPLIT, toy_config(**{**RUNS[name], "accumulation": 1}), output=tmp_path)
    for row, other in zip(alone.history, found(two)[0]["histories"][name], strict=True):
        assert other["total"] == pytest.approx(row["total"], rel=1e-4)
    start = toy_model().trained_state()
    shared = weights(two / name)
    for part, value in weights(tmp_path).items():
        assert_close(shared[part], value, atol=1e-5, rtol=0, msg=part)
    assert any((shared[part] - value).abs().max() > 1e-3 for part, value in start.items()), "there was training"


def test_a_signal_to_one_process_stops_all_after_the_same_iteration(two: Path) -> None:
    assert [each["code"] for each in found(two)] == [143, 143]
    assert [each["rest"] for each in found(two)] == [3 * 2, 3 * 2], "the other three iterations were left"
    resumed = weights(two / "stopped")
    assert all(resumed[name].equal(value) for name, value in weights(two / "unstopped").items())


def test_a_state_lists_what_any_process_left_out(two: Path) -> None:
    assert read_sealed(two / "holes" / STATE)["left_out"] == ["an odd picture"]
