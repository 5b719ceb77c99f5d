"""Two processes (gloo) against one: the same metrics exactly, the same weights, stops agreed on; and one voice."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from torch.testing import assert_close
from toys import SPLIT, Toys, child_environment, data_folder, same, toy_config, toy_model

from sptseg.checkpoints import load_model
from sptseg.datasets import Scenes
from sptseg.inference import evaluate
from sptseg.training import fit

pytestmark = pytest.mark.slow
ODD = {"length": 5, "sizes": ((32, 32), (40, 33))}
RUNS: dict[str, dict[str, Any]] = {
    "whole": {"iterations": 20},
    "accumulated": {"iterations": 20, "accumulation": 2},
    "transductive": {"setting": "transductive"},
}
SCRIPT = """
import json, os, signal, sys
folder, runs, odd = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
import torch
torch.set_num_threads(1)
from accelerate import PartialState
from toys import SPLIT, ActsAt, Toys, toy_config, toy_model
from sptseg.cli import main
from sptseg.inference.evaluation import evaluate
from sptseg.training.loop import fit

losses = {name: [row["total"] for row in fit(toy_model(), Toys(), SPLIT, toy_config(**run),
          output=f"{folder}/{name}").history] for name, run in runs.items()}
state = PartialState()
assert state.num_processes == 2, state
rank = state.process_index
pictures = Toys(**odd)
scores = evaluate(toy_model(), pictures, SPLIT, progress=False).as_dict()

stopped = ActsAt(lambda: os.kill(os.getpid(), signal.SIGTERM), *[5] * rank)  # in the third iteration, on one only
config = toy_config(iterations=6)
try:
    fit(toy_model(dropout=0.1), stopped, SPLIT, config, output=folder + "/stopped")
    code = 0
except SystemExit as error:
    code = error.code
rest = Toys()
fit(toy_model(dropout=0.1), rest, SPLIT, config, output=folder + "/stopped", resume=True)
fit(toy_model(dropout=0.1), Toys(), SPLIT, config, output=folder + "/unstopped")

main(["evaluate", "--images", "3", "--workers", "0", "--json", f"{folder}/new/scores.json"])
main(["ablate", "--output", f"{folder}/table", "--configurations", "dense-clip", "--validation.images", "2"])
found = {"losses": losses, "scores": scores, "read": pictures.read, "code": code, "rest": len(rest.read)}
open(f"{folder}/{rank}.json", "w").write(json.dumps(found))
state.destroy_process_group()
"""


def launched(folder: Path, *program: str) -> subprocess.CompletedProcess[str]:
    """A program in two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *program]
    options: Any = {"env": child_environment(), "capture_output": True, "text": True}
    return subprocess.run(launch, cwd=folder, timeout=300, **options)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes did, launched once for all tests."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "script.py").write_text(SCRIPT)
    done = launched(folder, "script.py", str(folder), json.dumps(RUNS), json.dumps(ODD))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("stopped by SIGTERM after iteration 3 of 6; the state is in ") == 1
    (folder / "said").write_text(done.stdout)
    return folder


def found(folder: Path, name: str) -> list[Any]:
    """What both processes noted."""
    return [json.loads((folder / f"{rank}.json").read_text())[name] for rank in (0, 1)]


def test_evaluation_counts_each_of_an_odd_number_of_pictures_once(two: Path) -> None:
    expected = evaluate(toy_model(), Toys(**ODD), SPLIT, progress=False).as_dict()
    one, other = found(two, "read")
    assert sorted(one + other) == [0, 1, 2, 3, 4]
    assert found(two, "scores") == [expected, expected]


@pytest.mark.parametrize("name", RUNS)
def test_training_is_one_processs_with_the_whole_batch(name: str, two: Path) -> None:
    """Micro-batches too: two processes of two each are one batch of one process; transductive labels are per batch."""
    alone = fit(toy_model(), Toys(), SPLIT, toy_config(**{**RUNS[name], "accumulation": 1}))
    losses, shared = found(two, "losses")[0][name], load_file(two / name / "model.safetensors")
    assert losses == pytest.approx([row["total"] for row in alone.history], rel=1e-4)
    for part, value in alone.model.trained_state().items():
        assert_close(shared[part], value, atol=1e-5, rtol=0, msg=part)
    start = toy_model().trained_state()
    assert any((shared[part] - value).abs().max() > 1e-3 for part, value in start.items()), "there was training"


def test_a_signal_to_one_process_stops_all_after_the_same_iteration(two: Path) -> None:
    assert found(two, "code") == [143, 143]
    assert found(two, "rest") == [3 * 2, 3 * 2], "the other three iterations were left"
    assert same(*(load_file(two / name / "model.safetensors") for name in ("stopped", "unstopped")))


def test_commands_print_and_write_once(two: Path) -> None:
    data = Scenes(3)
    expected = evaluate(load_model("embedded"), data, data.split, progress=False)
    said = (two / "said").read_text()
    assert said.count(expected.table()) == said.count("| pAcc | mIoU(S) | mIoU(U) | hIoU |\n|---|---|---|---|\n") == 1
    assert json.loads((two / "new" / "scores.json").read_text()) == expected.as_dict()
    assert said.count((two / "table" / "table.md").read_text()) == said.count("| configuration |") == 1


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("evaluate --data data --clip tiny --clip-weights none", "b.png is damaged or cut off"),
        ("evaluate --clip nonsense", "--clip nonsense needs --clip-weights"),
        ("evaluate --nonsense", "--nonsense"),
        ("segment data/images --classes grass", "sptseg segment works in one process; start it without torchrun or"),
    ],
)
def test_of_a_fault_one_process_speaks(command: str, said: str, tmp_path: Path) -> None:
    """Whether one process meets it (the second reads b.png) or both."""
    data = data_folder(tmp_path / "data", dict.fromkeys("abcd", np.zeros((20, 20))))
    (data / "images" / "b.png").write_bytes((data / "images" / "b.png").read_bytes()[:200])
    done = launched(tmp_path, "-m", "sptseg.cli", *command.split())
    assert done.returncode != 0 and done.stdout == ""
    spoken = [line for line in done.stderr.splitlines() if said in line]
    assert len(spoken) == 1
    assert "Traceback" not in done.stderr[: done.stderr.index("torch/distributed/elastic")], "but for the launcher's"
