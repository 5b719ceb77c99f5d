"""Batches from other processes equal those read here, with room in shared memory and without; faults are named."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections import namedtuple
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from toys import SPLIT, ActsAt, Toys, data_folder, toy_config, toy_model

from sptseg import evaluate, fit
from sptseg.datasets import loading, read_batches

Pair = namedtuple("Pair", "image names")
READ = """
import sys
from sptseg.datasets import Augmentation, ImageMaskFolder, read_batches
from sptseg.training import Positions, TrainingStream, label_table
from sptseg.training.stream import collate
data = ImageMaskFolder(sys.argv[1])
stream = TrainingStream(data, Augmentation(crop=512), label_table(data.split, "inductive")[1], 0)
for batch in read_batches(stream, Positions(range(6), 8, 1, 0, 1), collate, 2, False):
    print(tuple(batch.image.shape))
"""


def collate(samples: list[Any]) -> Pair:
    return Pair(torch.stack([sample["image"] for sample in samples]), [{"name": sample["name"]} for sample in samples])


@pytest.mark.parametrize("room", [2**40, 2**20])
def test_processes_hand_over_the_same_batches(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tensors or as arrays, whatever they are packed in."""
    kinds = []
    monkeypatch.setattr(loading, "room", lambda: room)
    monkeypatch.setattr(torch, "from_numpy", lambda array: kinds.append(1) or torch.as_tensor(array))
    positions = [[2, 0], [1], [5, 4, 3]]
    here, there = (list(read_batches(Toys(6, ((512, 512),)), positions, collate, workers, False)) for workers in (0, 2))
    for one, other in zip(here, there, strict=True):
        assert type(other) is Pair and torch.equal(one.image, other.image) and one.names == other.names
        assert other.image.dtype == torch.uint8
    assert len(kinds) == (0 if room > 2**20 else 3)


def test_shared_memory_is_taken_for_what_leaves_room_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 MiB and two workers, each batch may take an eighth; where there is none, this process reads."""
    monkeypatch.setattr(loading, "get_worker_info", lambda: SimpleNamespace(num_workers=2))
    monkeypatch.setattr(loading, "room", lambda: 2**26)
    for size, kind in ((2**23 - 1, torch.Tensor), (2**23, np.ndarray)):
        found = loading.handed_over(("name", [torch.zeros(size, dtype=torch.uint8)]))
        assert type(found[1][0]) is kind and found[0] == "name" and found[1][0].nbytes == size
    monkeypatch.undo()
    monkeypatch.setattr(loading, "SHARED_MEMORY", "/no/such/folder")
    monkeypatch.setattr(sys, "platform", "linux")
    toys = Toys()
    with pytest.warns(UserWarning, match="^/no/such/folder has no room for 2 workers; reading in this process$"):
        assert len(list(read_batches(toys, [[2, 0]], collate, 2, False))) == 1
    assert toys.read == [2, 0]
    monkeypatch.setattr(sys, "platform", "darwin")
    assert loading.room() == sys.maxsize, "others set no such limit"
    monkeypatch.undo()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert len(list(read_batches(toys, [[2, 0]], collate, 2, False))) == 1, "on one core PyTorch would warn of two"


def stop(error: BaseException | None) -> None:
    """Raises the error, or ends the process."""
    if error is not None:
        raise error
    os.kill(os.getpid(), signal.SIGKILL)


def faulty(error: BaseException | None = None) -> ActsAt:
    return ActsAt(partial(stop, error), 3)


@pytest.mark.parametrize(("workers", "error"), [(0, OSError("3.jpg is damaged")), (1, ValueError("3.png: value 9"))])
def test_faults_of_pictures_come_without_a_traceback(workers: int, error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        evaluate(toy_model(), faulty(error), SPLIT, progress=False, workers=workers)
    assert str(raised.value) == str(error) and not multiprocessing.active_children(), "and end with the evaluation"


def test_a_process_that_ends_or_cannot_start_is_one_sentence_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when memory runs out; in evaluation and in training."""
    said = r"a helping process ended before its time, as when memory runs out [^\n]*; use workers=0 .command line: --"
    with pytest.raises(OSError, match=f"^{said}workers 0.$"):
        evaluate(toy_model(), faulty(), SPLIT, progress=False, workers=1)
    with pytest.raises(OSError, match=f"^{said}train.workers 0.$"):
        fit(toy_model(), faulty(), SPLIT, toy_config(workers=1))
    for lost in (ConnectionResetError(104, "reset"), EOFError()):  # between a batch and its tensors
        with pytest.raises(RuntimeError, match="^DataLoader worker ended while it handed over a batch"):
            list(loading.received(map(Mock(side_effect=lost), [0])))
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr("torch.utils.data.DataLoader.__iter__", full)
    with pytest.raises(OSError, match="no process that reads pictures can be started .*; read with 0 workers"):
        read_batches(Toys(), [[0]], collate, 1, False)
    with pytest.raises(ValueError, match="workers is -1; wanted 0 to 1024"):
        evaluate(toy_model(), Toys(), SPLIT, progress=False, workers=-1)


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"]).returncode != 0,
    reason="a small /dev/shm wants root, who may mount one",
)
@pytest.mark.parametrize("room", ["64m", "4k"])
def test_photographs_in_a_plain_container(room: str, tmp_path: Path) -> None:
    """Real: /dev/shm of 64 MB, photographs of 1500 x 1000, training batches of 42 MB; and no /dev/shm to speak of."""
    data = data_folder(tmp_path / "data", {str(i): np.full((1000, 1500), i % 3) for i in range(8)}, unseen=["tree"])
    script = f'mount -t tmpfs -o size={room} tmpfs /dev/shm && exec "$@"'
    inside = ["unshare", "-m", "sh", "-c", script, "sh", sys.executable]
    evaluation = ["-m", "sptseg.cli", "evaluate", "--clip", "tiny", "--clip-weights", "none", "--data", str(data)]
    for command, told in ((evaluation, "| pAcc |"), (["-c", READ, str(data)], "(8, 3, 512, 512)\n" * 6)):
        done = subprocess.run([*inside, *command], capture_output=True, text=True, timeout=100)
        assert done.returncode == 0 and told in done.stdout and "Traceback" not in done.stderr, done.stderr
        assert (room == "4k") == ("/dev/shm has no room for 2 workers; reading in this process" in done.stderr)
