"""The usual recipe for a CLIP that nothing was trained on, and what papers report of it."""

from __future__ import annotations

from dataclasses import replace

from open_clip import OPENAI_IMAGENET_TEMPLATES

from sptseg import scenes
from sptseg.inference import table
from sptseg.model import DENSE_CLIP, EMBEDDED_CLIPS, ModelConfig, ReadOut, default_readout

IMAGENET_TEMPLATES = tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)  # OpenAI's 80
SHORT_SIDES = {"cityscapes": 560, "coco-stuff": 448}  # all others 336
COLUMNS = {
    "voc2012": "VOC20", "context-otseg": "Context59", "context-cascade": "Context59", "coco-stuff": "COCO-Stuff",
    "cityscapes": "Cityscapes", "ade20k": "ADE150",
}  # fmt: skip
# mIoU in percent with OpenAI's ViT-B/16, from the papers' own tables: MaskCLIP (arXiv 2112.01071), GEM (2312.00878),
# SCLIP (2312.01597), ClearCLIP (2407.12442) and NACLIP (2404.08181), of which the later ones also ran the earlier.
TABLE = """
read-out  | VOC20 | Context59 | COCO-Stuff | Cityscapes   | ADE150
plain     | 41.9  | 9.2       | 4.4        | 5.0          | 2.9
maskclip  | 74.9  | 26.4      | 16.4       | 12.6 to 24.9 | 9.8 to 11.9
gem       | 79.9  | 35.9      | 23.7       | 30.8         | 15.7
sclip     | 81.5  | 34.5      | 22.8       | 32.3         | 16.5
clearclip | 80.9  | 35.9      | 23.9       | 30.0         | 16.7
naclip    | 79.7  | 35.2      | 23.3       | 35.5         | 17.4
"""
HEAD, *ROWS = ([cell.strip() for cell in line.split("|")] for line in TABLE.strip().splitlines())
PUBLISHED = {name: dict(zip(HEAD[1:], figures, strict=True)) for name, *figures in ROWS}


def training_free(
    clip: str, clip_weights: str | None = None, readout: ReadOut | None = None, layout: str = ""
) -> ModelConfig:
    """Dense CLIP as SCLIP's evaluation runs it, and those after it, on the data set of a layout.

    80 templates, softmax of 40 times the cosine over all names, CLIP's image statistics, bicubic positions; windows of
    224 every 112 pixels of pictures with a short side of 336 (Cityscapes 560, COCO-Stuff 448). ClearCLIP, as released:
    50 times, windows of 448 (Cityscapes 224) every 224 pixels of a short side of 448. The tiny CLIPs have their own
    window, statistics and templates. `readout`: by default `default_readout`.
    """
    readout = readout or default_readout(clip)
    config = replace(
        DENSE_CLIP, clip=clip, clip_weights=clip_weights, readout=readout, image_size=(224, 224), window_stride=0.5,
        short_side=SHORT_SIDES.get(layout, 336), bicubic=True, softmax_scale=40.0, templates=IMAGENET_TEMPLATES,
        normalization="clip",
    )  # fmt: skip
    if clip in EMBEDDED_CLIPS:
        own = {"templates": scenes.TEMPLATES, "normalization": DENSE_CLIP.normalization}
        return replace(config, image_size=DENSE_CLIP.image_size, short_side=192, **own)
    if readout == "clearclip":
        side = 224 if layout == "cityscapes" else 448
        return replace(config, image_size=(side, side), window_stride=224 / side, short_side=448, softmax_scale=50.0)
    return config


def beside_published(config: ModelConfig, layout: str, miou: float) -> list[str]:
    """A table of an mIoU (0..1) beside the published one; none if this read-out, CLIP and data set have no such."""
    openai = config.clip in ("ViT-B-16", "ViT-B-16-quickgelu") and config.clip_weights == "openai"
    if config.softmax_scale is None or not openai or layout not in COLUMNS:
        return []
    column = COLUMNS[layout]
    row = config.readout, column, PUBLISHED[config.readout][column], f"{100 * miou:.1f}"
    return [table(("read-out", "data set", "published mIoU", "yours"), row)]
