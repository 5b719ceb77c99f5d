"""Data sets of a few photographs as their authors release them, beside the same masks as others prepare them."""

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from sptseg.datasets import splits

# The ids of Context's 59 classes in its labels.txt, in the classes' order, as mmsegmentation's converter has them.
CONTEXT_IDS = [
    2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158, 159,
    162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368, 397,
    415, 416, 420, 424, 427, 440, 445, 454, 458,
]  # fmt: skip
NAMES = dict(zip(CONTEXT_IDS, splits.context().classes, strict=True)) | {308: "pottedplant", 427: "tvmonitor"}
LABELS_TXT = [f"{i}: {NAMES.get(i, f'other {i}')}" for i in range(1, 460)]


def photograph(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = list(path.stem.removesuffix("_leftImg8bit").encode())
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "PNG" if path.suffix == ".png" else "JPEG")


def mask(path: Path, *values: int) -> None:
    """Four upright bands of mask values: a PNG, in the devkit's colours if VOC's own, or SBD's or Context's .mat."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.array([values] * 48, np.uint16 if path.parent.name == "trainval" else np.uint8).repeat(16, axis=1)
    if path.suffix == ".png":
        image = Image.fromarray(labels)
        if path.parent.name == "SegmentationClass":
            image.putpalette([channel for colour in [(0, 0, 0), *splits.voc2012().palette] for channel in colour])
        image.save(path)
    elif path.parent.name == "cls":
        savemat(path, {"GTcls": {"Boundaries": [], "Segmentation": labels, "CategoriesPresent": [1]}})
    else:
        savemat(path, {"LabelMap": labels})


def listing(path: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(names) + "\n")


def voc(released: Path, prepared: Path) -> set[str]:
    """SBD lists a validation image of VOC, which is left out, and a training image, whose own mask counts."""
    own = {"2007_1": (0, 255, 1, 16), "2007_3": (0, 3, 255, 17), "2007_4": (1, 255, 0, 20)}
    more = {"2008_2": (2, 0, 20, 3), "2008_5": (14, 7, 7, 0), "2007_1": (9,) * 4, "2007_3": (9,) * 4}
    sbd = released.parent / "benchmark_RELEASE/dataset"
    for root in (released, prepared):
        for name in {**own, **more}:
            photograph(root / f"JPEGImages/{name}.{'jpg' if name in own else 'JPG'}")
        for name, values in own.items():
            mask(root / f"SegmentationClass/{name}.png", *values)
        listing(root / "ImageSets/Segmentation/train.txt", "2007_1")
        listing(root / "ImageSets/Segmentation/val.txt", "2007_3", "2007_4")
    for name, values in more.items():
        mask(sbd / f"cls/{name}.mat", *values)
        mask(prepared / f"SegmentationClassAug/{name}.png", *values)
    listing(sbd / "train.txt", "2008_5", "2007_3")
    listing(sbd / "val.txt", "2008_2", "2007_1")
    listing(prepared / "ImageSets/Segmentation/aug.txt", "2008_2", "2008_5")
    return {"bird", "sheep", "aeroplane", "tv monitor"}


def coco_stuff(released: Path, prepared: Path) -> set[str]:
    for place, raw, converted in (
        ("train2017/000000000009", (12, 26, 181, 255), (11, 24, 170, 255)),
        ("train2017/000000000025", (1, 105, 2, 64), (1, 94, 2, 59)),
        ("val2017/000000000139", (0, 20, 255, 171), (0, 19, 255, 160)),
    ):
        for root in (released, prepared):
            photograph(root / f"images/{place}.jpg")
        mask(released / f"stuffthingmaps_trainval2017/{place}.png", *raw)
        mask(prepared / f"annotations/{place}.png", *raw)
        mask(prepared / f"annotations/{place}_labelTrainIds.png", *converted)
    return {"person", "cow", "wall-concrete"}


def context(released: Path, prepared: Path) -> set[str]:
    for name, raw, converted in (
        ("2008_1", (2, 308, 431, 98), (1, 40, 0, 20)),
        ("2008_2", (427, 18, 0, 25), (55, 3, 0, 7)),
        ("2008_3", (9, 2, 459, 458), (2, 1, 0, 59)),
    ):
        for root in (released, prepared):
            photograph(root / f"JPEGImages/{name}.jpg")
        mask(released / f"trainval/{name}.mat", *raw)
        mask(prepared / f"SegmentationClassContext/{name}.png", *converted)
    for lists in (released / "ImageSets/Main", prepared / "ImageSets/SegmentationContext"):
        listing(lists / "train.txt", "2008_1", "2008_2")
        listing(lists / "val.txt", "2008_3")
    listing(released / "labels.txt", *LABELS_TXT)
    return {"bag", "aeroplane", "wood"}


def cityscapes(released: Path, prepared: Path) -> set[str]:
    """Prepared is a plain folder of the validation images."""
    for place, raw, labels in (
        ("val/frankfurt/frankfurt_000000_000294", (7, 33, 3, 26), (0, 18, 255, 13)),
        ("val/lindau/lindau_000001_000019", (24, 4, 11, 23), (11, 255, 2, 10)),
        ("train/aachen/aachen_000000_000019", (7, 8, 0, 33), None),
    ):
        photograph(released / f"leftImg8bit/{place}_leftImg8bit.png")
        mask(released / f"gtFine/{place}_gtFine_labelIds.png", *raw)
        mask(released / f"gtFine/{place}_gtFine_instanceIds.png", *[99] * 4)
        if labels:
            photograph(prepared / f"images/{Path(place).name}.png")
            mask(prepared / f"masks/{Path(place).name}.png", *labels)
    listing(prepared / "classes.txt", *splits.cityscapes().classes)
    return {"road", "bicycle", "car", "person", "building", "sky"}


def ade20k_847(released: Path, prepared: Path) -> set[str]:
    """Wall, sky, person, adding machine; numbers of none of the 847; nothing. Blue tells instances apart."""
    for place, raw, labels in (
        ("training/urban/street/ADE_train_00000001", (2978, 0, 3148, 1), (0, 65535, 846, 65535)),
        ("validation/work_place/office/ADE_val_00000001", (1831, 2420, 500, 6655), (11, 2, 609, 65535)),
        ("validation/urban/alley/ADE_val_00000002", (95, 0, 97, 96), (114, 65535, 191, 252)),
    ):
        subset, name = place.split("/")[0], place.split("/")[-1]
        photograph(released / f"images/ADE/{place}.jpg")
        photograph(prepared / f"images_detectron2/{subset}/{name}.jpg")
        colours = [(number // 256 * 10 + i, number % 256, 10 * i) for i, number in enumerate(raw)]
        pixels = np.array([colours] * 48, np.uint8).repeat(16, axis=1)
        Image.fromarray(pixels).save(released / f"images/ADE/{place}_seg.png")
        Image.fromarray(pixels).save(released / f"images/ADE/{place}_parts_1.png")
        photograph(released / f"images/ADE/{place}/instance_000_{name}.jpg")
        (prepared / f"annotations_detectron2/{subset}").mkdir(parents=True, exist_ok=True)
        tiff = Image.fromarray(np.array([labels] * 48, np.uint16).repeat(16, axis=1))
        tiff.save(prepared / f"annotations_detectron2/{subset}/{name}.tif")
    return {"person", "sky", "chips", "bag", "traveling bag", "handbag"}


# By layout: makes both below two roots, and returns classes in the validation masks.
MINIATURES = {"voc2012": voc, "coco-stuff": coco_stuff, "context-otseg": context, "cityscapes": cityscapes}
MINIATURES["ade20k-847"] = ade20k_847
