"""Masks in COCO's JSON, as annotation tools and pycocotools read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """A mask, bool (H, W), in COCO's compressed run-length encoding: {"size": [H, W], "counts": text}.

    Lengths of runs down the columns, of False first; from the fourth on less the one two before. Each as digits of five
    bits, the lowest first, two's complement, plus 32 if more follow, plus 48. Source: pycocotools, maskApi.c.
    """
    flat = np.pad(mask.ravel(order="F"), 1, constant_values=False)
    ends = np.flatnonzero(flat[1:] != flat[:-1])
    lengths = np.diff(ends, prepend=0, append=mask.size)
    lengths = lengths[: -1 if mask[-1, -1] else None]  # there is no last run of no pixels
    lengths[3:] -= lengths[1:-2].copy()
    text = bytearray()
    for value in lengths.tolist():
        more = True
        while more:
            digit, value = value & 31, value >> 5
            more = value != (-1 if digit & 16 else 0)
            text.append(digit + 32 * more + 48)
    return {"size": list(mask.shape), "counts": text.decode()}


class CocoMasks:
    """One annotation for each class in each picture; category i + 1 is class i, and what has no class has none."""

    def __init__(self, classes: Sequence[str]) -> None:
        categories = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
        self.content: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": categories}

    def add(self, file_name: str, labels: np.ndarray) -> None:
        """Adds a picture with labels (H, W), those of no class 255 or above all classes."""
        images, annotations, categories = self.content.values()
        height, width = labels.shape
        images.append({"id": len(images) + 1, "file_name": file_name, "height": height, "width": width})
        for label in np.flatnonzero(np.bincount(labels.ravel(), minlength=len(categories))[: len(categories)]).tolist():
            mask = labels == label
            rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
            x, y = int(columns[0]), int(rows[0])
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": len(images), "category_id": label + 1, "iscrowd": 0,
                    "segmentation": run_lengths(mask), "area": int(mask.sum()),
                    "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
                }
            )  # fmt: skip

    def json(self) -> str:
        return json.dumps(self.content) + "\n"
