"""What a run starts from: data, model and training of the embedded world, and of VOC, COCO-Stuff and Context, which are
the literature's protocol (ZegCLIP's configuration files, as SPT-SEG published none); the configurations that are
compared; and the usual recipe for a CLIP that nothing was trained on, with what papers report of it."""

from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

from open_clip import OPENAI_IMAGENET_TEMPLATES

from sptseg import scenes
from sptseg.datasets import FACTS, SCENES_TO_TRAIN, Data
from sptseg.inference import table
from sptseg.model import DENSE_CLIP, EMBEDDED_CLIPS, EMBEDDED_CONFIG, SPT_RELEASED, ZEGCLIP, ModelConfig, readouts
from sptseg.system import cores
from sptseg.training.config import EMBEDDED_TRAINING, TrainConfig
from sptseg.training.stream import Setting

ReadOut = readouts.ReadOut


@dataclass(frozen=True)
class Preset:
    """Data, model and training that belong together, in the inductive setting."""

    data: Data
    model: ModelConfig
    train: TrainConfig

    def with_method(self, method: ModelConfig) -> Self:
        """Another method, such as `ZEGCLIP`, on this preset's CLIP, picture size, prompt tokens and templates."""
        kept = "clip", "clip_weights", "image_size", "templates", "normalization"
        tokens = self.model.prompt_tokens if method.prompt_tokens else 0
        ours = {name: getattr(self.model, name) for name in kept}
        return replace(self, model=replace(method, **ours, prompt_tokens=tokens))


def in_setting(model: ModelConfig, train: TrainConfig, setting: Setting) -> tuple[ModelConfig, TrainConfig]:
    """Inductive options in another setting, in which the scores of seen classes are not lowered.

    Transductive training takes the second half of the iterations: it goes on from the checkpoint that inductive
    training leaves after the first, `halfway.safetensors` (ZegCLIP: VOC 10k + 10k, COCO-Stuff 40k + 40k)."""
    if setting == "inductive":
        return model, train
    iterations = train.iterations // 2 if setting == "transductive" else train.iterations
    return replace(model, seen_offset=0.0), replace(train, setting=setting, iterations=iterations)


SEVERAL_TEMPLATES = tuple(FACTS["templates"])
EMBEDDED = Preset(SCENES_TO_TRAIN, EMBEDDED_CONFIG, EMBEDDED_TRAINING)
# TrainConfig's defaults are the protocol's; the folders are those of mmsegmentation's data guide.
VOC = Preset(
    Data("data/VOCdevkit/VOC2012", "voc2012"),
    replace(SPT_RELEASED, clip="ViT-B-16-quickgelu", clip_weights="openai", image_size=(512, 512), prompt_tokens=10),
    TrainConfig(iterations=20_000, workers=min(12, cores())),  # each makes 50 crops a second or so
)
COCO_STUFF = Preset(
    Data("data/coco_stuff164k", "coco-stuff"),
    replace(VOC.model, prompt_tokens=100, templates=SEVERAL_TEMPLATES),
    replace(VOC.train, iterations=80_000),
)
# Neither ZegCLIP nor SPT-SEG published a configuration for Context. OTSeg's has 40k iterations and 10 prompt tokens, as
# here, but crops of 480, and windows of 480 every 80 pixels; Cascade-CLIP's classes: --layout context-cascade.
CONTEXT = Preset(
    Data("data/VOCdevkit/VOC2010", "context-otseg"),
    replace(VOC.model, templates=SEVERAL_TEMPLATES),
    replace(VOC.train, iterations=40_000),
)
# Best on unseen classes of the plain tiny CLIP after 500 steps, not after 1500 (the study); unproven on photographs.
FROM_NACLIP = replace(EMBEDDED_CONFIG, readout="naclip")
PRESETS = {
    "embedded": EMBEDDED,
    "naclip": replace(EMBEDDED, model=replace(FROM_NACLIP, clip="tiny-plain")),
    "voc-naclip": VOC.with_method(FROM_NACLIP),
    "coco-stuff-naclip": COCO_STUFF.with_method(FROM_NACLIP),
    "spt": replace(EMBEDDED, model=SPT_RELEASED),
    "zegclip": replace(EMBEDDED, model=ZEGCLIP),
    "voc": VOC,
    "voc-zegclip": VOC.with_method(ZEGCLIP),
    "coco-stuff": COCO_STUFF,
    "coco-stuff-zegclip": COCO_STUFF.with_method(ZEGCLIP),
    "context": CONTEXT,
    "context-zegclip": CONTEXT.with_method(ZEGCLIP),
}
PresetName = Literal[
    "embedded", "spt", "zegclip", "naclip", "voc-naclip", "coco-stuff-naclip",
    "voc", "voc-zegclip", "coco-stuff", "coco-stuff-zegclip", "context", "context-zegclip",
]  # fmt: skip
DENSE_ZEGCLIP = replace(ZEGCLIP, start="dense_clip", class_embedding_twice=False, seen_offset=0.0)
CONFIGURATIONS: dict[str, ModelConfig] = {
    "dense-clip": DENSE_CLIP,
    **{f"dense-clip-{name}": replace(DENSE_CLIP, readout=name) for name in get_args(ReadOut) if name != "plain"},
    "zegclip-released": ZEGCLIP,
    "spt-released": SPT_RELEASED,
    "zegclip": DENSE_ZEGCLIP,
    "zegclip+spectral-prompts": replace(DENSE_ZEGCLIP, spectral_layers=(0, 1)),
    "spt": EMBEDDED_CONFIG,
    "spt+selection": replace(EMBEDDED_CONFIG, selection=True),
    "spt-spectral-prompts": replace(EMBEDDED_CONFIG, spectral_layers=()),
    "spt-deep-prompts": replace(EMBEDDED_CONFIG, prompt_tokens=0),
    "spt+ssim": replace(EMBEDDED_CONFIG, loss="spt"),
    "zegclip-released+spectral-prompts": replace(ZEGCLIP, spectral_layers=(0, 1)),
    "spt-released-ssim": replace(SPT_RELEASED, loss="zegclip"),
}
# The paper's ablation, part by part: nothing trained, ZegCLIP, + spectral prompts, + spectral guided decoder, + SSIM.
LADDER = ("dense-clip", "zegclip-released", "zegclip-released+spectral-prompts", "spt-released-ssim", "spt-released")

IMAGENET_TEMPLATES = tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)  # OpenAI's 80


def training_free(
    clip: str, clip_weights: str | None = None, readout: ReadOut | None = None, layout: str = ""
) -> ModelConfig:
    """Dense CLIP as SCLIP's evaluation runs it, and those after it, on the data set of a layout.

    80 templates, softmax of 40 times the cosine over all names, CLIP's image statistics, bicubic positions; windows of
    224 every 112 pixels of pictures with a short side of 336 (Cityscapes 560, COCO-Stuff 448). ClearCLIP, as released:
    50 times, windows of 448 (Cityscapes 224) every 224 pixels of a short side of 448. The tiny CLIPs have their own
    window, statistics and templates. `readout`: by default `default_readout`."""
    readout = readout or readouts.default_readout(clip)
    config = replace(
        DENSE_CLIP, clip=clip, clip_weights=clip_weights, readout=readout, image_size=(224, 224), window_stride=0.5,
        short_side=FACTS.get(layout, {}).get("short_side", 336), bicubic=True, softmax_scale=40.0,
        templates=IMAGENET_TEMPLATES, normalization="clip",
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
    told = FACTS.get(layout, {})
    if config.softmax_scale is None or not openai or "published" not in told:
        return []
    row = config.readout, told["column"], told["published"][config.readout], f"{100 * miou:.1f}"
    return [table(("read-out", "data set", "published mIoU", "yours"), row)]
