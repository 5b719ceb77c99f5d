"""Pictures of noisy colour blocks, folders of pictures, and a model small enough to train on them in a second."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import small_clip
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from sptseg.datasets.folders import Sample
from sptseg.datasets.splits import IGNORE, Split
from sptseg.model.clip import Clip
from sptseg.model.config import ModelConfig
from sptseg.model.spt_seg import SptSeg, build_model
from sptseg.training.loop import TrainConfig

SPLIT = Split.from_names("toys", ["grass", "water", "boat", "tree", "house"], unseen=["boat", "house"])
PARK = Split.from_names("park", ["grass", "water", "tree", "boat"], unseen=["tree"])
COLOURS = torch.tensor([[40, 160, 40], [30, 60, 200], [200, 40, 40], [10, 80, 10], [220, 220, 90]])


class Toys(Dataset[Sample]):
    """Two classes side by side, a row of ignored pixels; picture i is always the same, sizes take turns."""

    def __init__(self, length: int = 6, sizes: tuple[tuple[int, int], ...] = ((32, 32),)) -> None:
        self.length, self.sizes = length, sizes
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        self.read.append(index)
        height, width = self.sizes[index % len(self.sizes)]
        label = torch.full((height, width), index % 5)
        label[:, width // 2 :] = (index // 2 + 1) % 5
        label[0] = IGNORE
        noise = torch.randint(-30, 31, (3, height, width), generator=torch.Generator().manual_seed(index))
        colours = COLOURS[label.clamp(max=4)].permute(2, 0, 1)  # (3, H, W)
        image = (colours + noise).clamp(0, 255).to(torch.uint8)
        return {"image": tv_tensors.Image(image), "label": tv_tensors.Mask(label), "name": str(index)}


def child_environment() -> dict[str, str]:
    """For processes that import the package and the tests' helpers, on the CPU, with one thread."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


class Intruder:
    """Would make a folder if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


class ActsAt(Toys):
    """Does something when its n-th picture is about to be read, for one n or several."""

    def __init__(self, action: Callable[[], object], *reads: int) -> None:
        super().__init__()
        self.action, self.reads = action, reads

    def __getitem__(self, index: int) -> Sample:
        if len(self.read) in self.reads:
            self.action()
        return super().__getitem__(index)


def interrupt() -> None:
    """As a machine that goes down would."""
    raise KeyboardInterrupt


class Bands(Toys):
    """Pictures (40, 48) of a park whose masks are upright bands of label values."""

    def __init__(self, bands: tuple[int, ...] = (0, 1, 2, 3), length: int = 5) -> None:
        super().__init__(length, ((40, 48),))
        self.bands, self.split = bands, PARK

    def __getitem__(self, index: int) -> Sample:
        label = torch.tensor(self.bands).repeat_interleave(48 // len(self.bands)).expand(40, 48)
        return {**super().__getitem__(index), "label": tv_tensors.Mask(label)}


def toy_model(clip: Clip | None = None, **changes: Any) -> SptSeg:
    """SPT-SEG without dropout on the small CLIP; always the same weights."""
    config = {"clip": "small", "image_size": (32, 32), "prompt_tokens": 2, "dropout": 0.0, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return build_model(ModelConfig(**config), small_clip() if clip is None else clip)


def toy_config(**changes: Any) -> TrainConfig:
    """A few steps in float32 in this process, without progress bars."""
    few = {"iterations": 5, "batch_size": 4, "warmup": 0, "learning_rate": 1e-3, "save_every": 0, "workers": 0}
    return TrainConfig(**{**asdict(TrainConfig()), **few, "precision": "no", "progress": False, **changes})


def noise(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    values = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def data_folder(
    root: Path,
    masks: Mapping[str, Any],
    classes: Sequence[str] = ("grass", "water", "tree"),
    unseen: Sequence[str] = (),
) -> Path:
    """A data set of noisy pictures: for every name a mask, values (H,W), as PNG files; classes.txt and unseen.txt."""
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for name, values in masks.items():
        mask = Image.fromarray(np.asarray(values, np.uint8))
        mask.save(root / "masks" / f"{name}.png")
        noise(size=mask.size).save(root / "images" / f"{name}.png")
    for file, names in {"classes.txt": classes, "unseen.txt": unseen}.items():
        if names:
            (root / file).write_text("\n".join(names), encoding="utf-8")
    return root


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two states have the same names and bits."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
