"""Data sets as released: read like their prepared forms, tables that meet the published lists, and what is refused."""

import json
import shlex
from pathlib import Path
from typing import get_args

import pytest
import torch
from conftest import refused
from miniatures import CONTEXT_IDS, LABELS_TXT, MINIATURES, context, listing, mask, voc
from scipy.io import savemat

from sptseg import datasets
from sptseg.cli.commands import main
from sptseg.datasets import layouts, splits
from sptseg.datasets.layouts import Data
from sptseg.datasets.splits import IGNORE

Roots = tuple[str, Path, Path]  # a layout, and its data as released and as prepared


@pytest.fixture
def roots(request: pytest.FixtureRequest, tmp_path: Path) -> Roots:
    released, prepared = tmp_path / "raw/data", tmp_path / "converted/data"
    MINIATURES[request.param](released, prepared)
    return request.param, released, prepared


@pytest.mark.parametrize("roots", MINIATURES, indirect=True)
def test_released_and_prepared_give_the_same(roots: Roots, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Picture by picture and label by label, and in `data check`."""
    layout, *folders = roots
    other = "folder" if layout == "cityscapes" else layout
    reports, said = [], []
    for folder, name in zip(folders, (layout, other), strict=True):
        check = tmp_path / "check.json"
        data = ["--layout", name, *(["--subset", "trainaug"] if layout == "voc2012" else [])]
        capsys.readouterr()
        main(["data", "check", str(folder), *data, "--json", str(check)])
        reports.append(json.loads(check.read_text()))
        said.append(capsys.readouterr().err)
    assert reports[0] == reports[1] and reports[0]["faults"] == []
    assert "images, masks as released, such as" in said[0]
    converter = "MaskFormer" if layout == "ade20k-847" else "mmsegmentation"
    assert (f"images, masks from {converter}'s converter, such as" in said[1]) == (other == layout)

    for stream in ("evaluation",) if other == "folder" else ("evaluation", "training"):
        ours, theirs = (Data(str(f), name).load(stream)[0] for f, name in zip(folders, (layout, other), strict=True))  # pyright: ignore
        assert len(ours) == len(theirs) > 0
        for mine, yours in zip(ours, theirs, strict=True):
            assert mine["name"] == yours["name"] and torch.equal(mine["image"], yours["image"])
            assert torch.equal(mine["label"], yours["label"]) and mine["label"].min() < splits.BY_NAME[layout]().ignore


@pytest.mark.parametrize("form", ["released", "aug.txt", "trainaug.txt", "pairs"])
def test_sbd_adds_what_voc_neither_trains_nor_validates_on(form: str, tmp_path: Path) -> None:
    """In all forms of its list; VOC's own mask comes before SBD's."""
    names = ("2007_1", "2008_2", "2008_5")
    released, prepared = tmp_path / "a/VOC2012", tmp_path / "b"
    voc(released, prepared)
    if form in ("trainaug.txt", "pairs"):
        line = "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png" if form == "pairs" else "{}"
        listing(prepared / "ImageSets/Segmentation/trainaug.txt", *map(line.format, names))
    dataset = datasets.voc2012(released if form == "released" else prepared, "trainaug")
    assert dataset.names == names
    assert [dataset[i]["label"][0, ::16].tolist() for i in range(2)] == [[255, 255, 0, 15], [1, 255, 19, 2]]


def test_tables_meet_the_published_lists() -> None:
    """Ids in COCO-Stuff's labels.txt, at either side of each gap, and in Cityscapes' labels.py."""
    coco = {
        1: "person", 11: "fire hydrant", 13: "stop sign", 25: "giraffe", 27: "backpack", 28: "umbrella", 31: "handbag",
        44: "bottle", 46: "wine glass", 65: "bed", 67: "dining table", 70: "toilet", 72: "tv", 82: "refrigerator",
        84: "book", 90: "toothbrush", 92: "banner", 110: "desk-stuff", 182: "wood",
    }  # fmt: skip
    city = {
        7: "road", 8: "sidewalk", 11: "building", 13: "fence", 17: "pole", 19: "traffic light", 23: "sky", 24: "person",
        28: "bus", 31: "train", 33: "bicycle",
    }  # fmt: skip
    ade = {  # in objects.txt of the release, at both ends of its alphabet, and after it
        6: "ad", 10: "air conditioner", 95: "bag", 96: "handbag", 97: "traveling bag", 1831: "person", 2978: "wall",
        3088: "workbench", 3148: "adding machine",
    }  # fmt: skip
    for values, split, published in (
        (layouts.ADE20K_847_VALUES, splits.ade20k_847(), ade),
        (layouts.COCO_STUFF_VALUES, splits.coco_stuff(), {i - 1: name for i, name in coco.items()}),
        (layouts.CITYSCAPES_VALUES, splits.cityscapes(), city),
    ):
        assert dict(zip(values, split.classes, strict=True)).items() >= published.items()
    twins = {"flowerpot": "pot", "silver screen": "screen", "wharf": "pier", "traveling bag": "bag", "grille": "grill"}
    twins |= {"handbag": "bag", "terrace": "patio", "basketball hoop": "basket", "tube": "pipe"}
    twins["control board"] = "control panel"  # the classes whose first word is another's name
    numbered = sorted(zip(layouts.ADE20K_847_VALUES, splits.ade20k_847().classes, strict=True))
    starts = [twins.get(name, name).split()[0][:4] for number, name in numbered if number < 3100]
    assert starts == sorted(starts), "numbers were given in the order of the alphabet, but for the last"
    assert layouts.labels_of([4, 2], (0, 300)).tolist() == [IGNORE, 2, 1, 2, 0, *[2] * 295, IGNORE]


def test_context_is_mapped_by_name(tmp_path: Path) -> None:
    context(tmp_path, tmp_path / "prepared")
    labels = layouts.context(tmp_path, "val")._labels.tolist()
    assert [labels[i] for i in CONTEXT_IDS] == list(range(59))
    assert len(labels) == 460 and labels.count(IGNORE) == 460 - 59
    listing(tmp_path / "labels.txt", *(line.replace(": table", ": diningtable") for line in LABELS_TXT))
    with pytest.raises(ValueError, match=r"labels.txt lacks table; wanted the 459 names in trainval.tar.gz"):
        datasets.context(tmp_path, "val")


def refusal(capsys: pytest.CaptureFixture[str], layout: str, root: Path) -> str:
    """What `data check` says after which masks were found."""
    subset = "trainaug" if layout == "voc2012" else "train"
    with pytest.raises(SystemExit, match="2"):
        main(["data", "check", str(root), "--layout", layout, "--subset", subset])
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("roots", "file", "value", "part", "wanted"),
    [
        ("voc2012", "../benchmark_RELEASE/dataset/cls/2008_2.mat", 21,
         "../benchmark_RELEASE", "../../VOCaug/dataset/ (SBD's masks; or SegmentationClassAug/ from mmseg"),
        ("coco-stuff", "stuffthingmaps_trainval2017/train2017/000000000009.png", 11,
         "images", "images/train2017/ or train2017/ (the photographs)"),
        ("context-otseg", "trainval/2008_2.mat", 460,
         "trainval", "(Context's masks; or SegmentationClassContext/ from mmseg"),
        ("cityscapes", "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png", 34,
         "gtFine", "gtFine/train/ (the masks)"),
    ],
    indirect=["roots"],
)  # fmt: skip
def test_unknown_values_damaged_masks_and_missing_parts_are_named(
    roots: Roots, file: str, value: int, part: str, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    layout, root, _ = roots
    path = root / file
    mask(path, 0, value, 0, 0)
    message = refusal(capsys, layout, root)
    assert f"{path} has mask value {value}, which {layout}'s masks as released never have: get the" in message
    path.write_bytes(b"junk" * 64)
    message = refusal(capsys, layout, root)
    assert f"{path} is damaged, or no mask of" in message or f"{path} is not an image" in message
    if path.suffix == ".mat":
        savemat(path, {"other": 1})
        assert "no mask of Context or SBD (KeyError('GTcls'))" in refusal(capsys, layout, root)
    (root / part).rename(root.parent / "elsewhere")
    message = refusal(capsys, layout, root)
    assert f"{root} has no " in message and wanted in message
    assert f", found {', '.join(sorted(x.name for x in root.iterdir()))}: check the path" in message
    assert message.endswith(f"sptseg data where {layout.removesuffix('-otseg')}")


@pytest.mark.parametrize("name", get_args(layouts.Released))
def test_where_ends_with_the_command_that_checks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["data", "where", name])
    printed = capsys.readouterr().out
    program, *command = shlex.split(printed.splitlines()[-1])
    assert program == "sptseg" and "unpacked in data/" in printed and "B  " in printed
    message = refused(capsys, *command)
    assert f"{command[2]} does not exist" in message and message.endswith(f"sptseg data where {name}")
