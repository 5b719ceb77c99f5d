"""Pictures kept in one file that many processes share, and pictures spoilt on purpose."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import Dataset
from torchvision import tv_tensors

from sptseg.datasets.folders import Sample
from sptseg.system import claimed, write

Array = np.ndarray
Corruption = Literal["blur", "noise", "jpeg", "contrast", "colour"]
STRENGTHS: dict[Corruption, tuple[float, float, float]] = {  # weak, middle, strong
    "blur": (0.7, 1.2, 2.0),  # standard deviation of a Gaussian, pixels
    "noise": (8, 16, 32),  # standard deviation of Gaussian noise, of 255
    "jpeg": (50, 25, 10),  # quality
    "contrast": (0.7, 0.5, 0.3),  # share that is left of the distance from the picture's mean colour
    "colour": (15, 30, 60),  # length of the shift of all pixels, of 255 a channel, in a random direction
}


def corrupt(image: Array, kind: Corruption, strength: int, seed: int | Sequence[int] = 0) -> Array:
    """A picture (H, W, 3) uint8, spoilt as in `STRENGTHS`, of strength 1 to 3; `seed`: of noise and the shift."""
    amount, rng, values = STRENGTHS[kind][strength - 1], np.random.default_rng(seed), image.astype(np.float32)
    if kind == "blur":
        return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(amount)))
    if kind == "jpeg":
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=int(amount))
        return np.asarray(Image.open(buffer))
    if kind == "noise":
        values += np.float32(amount) * rng.standard_normal(image.shape, np.float32)
    elif kind == "contrast":
        mean = values.mean((0, 1))
        values = mean + np.float32(amount) * (values - mean)
    else:
        direction = rng.standard_normal(3)
        values += (amount * direction / np.linalg.norm(direction)).astype(np.float32)
    return np.rint(values).clip(0, 255).astype(np.uint8)


class Corrupted(Dataset[Sample]):
    """A data set whose pictures are spoilt, each from a seed of its own."""

    def __init__(self, dataset: Dataset[Sample], kind: Corruption, strength: int) -> None:
        self.dataset, self.strength = dataset, strength
        self.kind: Corruption = kind
        self.names = tuple(f"{name}-{kind}-{strength}" for name in dataset.names)  # pyright: ignore

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[index]
        image = corrupt(sample["image"].permute(1, 2, 0).numpy(), self.kind, self.strength, seed=index)
        return {**sample, "image": tv_tensors.Image(torch.from_numpy(image.copy()).permute(2, 0, 1))}


class Pool(Dataset[Sample]):
    """A data set of pictures of one size, equal to the bit, read from one file (N, 4, H, W) uint8 of colours and label;
    the first process that asks for the file makes it, others wait for it."""

    def __init__(self, dataset: Dataset[Sample], file: Path) -> None:
        self.names: tuple[str, ...] = dataset.names  # pyright: ignore
        with claimed(file.with_suffix(".lock"), wait=True):
            if not file.is_file():
                samples = (dataset[i] for i in range(len(self.names)))
                pixels = [np.concatenate([s["image"], s["label"][None].to(torch.uint8)]) for s in samples]
                buffer = io.BytesIO()
                np.save(buffer, np.stack(pixels))
                write(file, buffer.getvalue())
        self.pixels = np.load(file, mmap_mode="r")
        if len(self.pixels) != len(self.names):
            raise ValueError(f"{file} holds {len(self.pixels)} pictures; wanted {len(self.names)}: delete it")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        pixels = torch.from_numpy(np.array(self.pixels[index]))
        image, label = tv_tensors.Image(pixels[:3]), tv_tensors.Mask(pixels[3].long())
        return {"image": image, "label": label, "name": self.names[index]}
