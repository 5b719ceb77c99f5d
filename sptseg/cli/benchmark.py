"""How fast and how small it is: ratios within one run, against the bare CLIP encoder and against plain PyTorch.

Absolute times differ from machine to machine and from minute to minute; so all that is compared runs in turns in one
process, and ratios are medians over the turns. Peak memory is that above what a case begins with.
"""

from __future__ import annotations

import json
import logging
import runpy
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Annotated, Any, Literal, get_args

import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor, nn

from sptseg import scenes, training
from sptseg.cli.measure import HEADER, Row, Stopwatch, Work, machine, peak_memory
from sptseg.datasets import ImageMaskFolder, Split
from sptseg.inference import Precision, at_precision, new_accelerator, window_logits
from sptseg.model import TINY, ModelConfig, SptSeg, build_model, read_out, readouts, resize_positions
from sptseg.system import output_place, write

Suite = Literal["inference", "training", "loss"]
PLAIN = Path(__file__).parents[2] / "tests" / "plain.py"


@dataclass(frozen=True)
class Sizes:
    """What is measured: a window's side, how many at once, class counts, the large picture's side, batches, turns."""

    clip: str = "ViT-B-16-quickgelu"
    side: int = 512
    windows: int = 1
    few: int = 20  # VOC
    many: int = 171  # COCO-Stuff
    large: int = 2048
    loss_batch: int = 1
    loss_classes: int = 156
    batch: int = 4
    trained: tuple[int, ...] = (20,)
    steps: int = 6
    turns: int = 3
    pictures: int = 32


SIZES = {"cpu": Sizes(), "cuda": Sizes(windows=64, loss_batch=4, batch=16, trained=(20, 171), steps=40)}
QUICK = Sizes(
    TINY, side=64, few=3, many=5, large=160, loss_classes=6, batch=2, trained=(3, 5), steps=2, turns=2, pictures=4
)
PRESETS = (("voc", "context"), ("coco-stuff",))  # with about so many classes as `trained` says


def plain_twins() -> SimpleNamespace:
    """tests/plain.py of a clone: the model and its losses in plain PyTorch."""
    if not PLAIN.is_file():
        raise ValueError(f"the plain losses to compare with are missing ({PLAIN}); run the loss suite from a clone")
    return SimpleNamespace(**runpy.run_path(str(PLAIN)))


def unit(*size: int) -> Tensor:
    return F.normalize(torch.randn(*size), dim=-1)


def new_model(sizes: Sizes, device: torch.device) -> SptSeg:
    """SPT-SEG with random weights (the tiny CLIP has its own), always the same."""
    torch.manual_seed(0)
    logging.disable(logging.WARNING)  # open_clip's: weights are random, as they are meant to be
    model = build_model(ModelConfig(clip=sizes.clip, image_size=(sizes.side, sizes.side)))
    logging.disable(logging.NOTSET)
    return model.to(device).eval()


def bare_encoder(model: SptSeg, sizes: Sizes, dtype: torch.dtype) -> nn.Module:
    """open_clip's own image tower, unchanged but for its positions, which it does not resize itself."""
    visual: Any = deepcopy(model.encoder.visual)
    grid = model.encoder.grid_of(torch.empty(1, 3, sizes.side, sizes.side))
    positions = resize_positions(visual.positional_embedding, visual.grid_size, grid)
    visual.positional_embedding = nn.Parameter(positions, requires_grad=False)
    return visual.to(dtype)


def to_labels(model: SptSeg, images: Tensor, text: Tensor) -> list[Tensor]:
    size = (images.shape[-2], images.shape[-1])
    return [logits.labels(size) for logits in window_logits(model, images, text, window_batch=max(4, len(images)))]


@torch.inference_mode()
def plain_labels(plain: SimpleNamespace, model: SptSeg, images: Tensor, text: Tensor) -> list[Tensor]:
    """A few windows at a time: all maps of 64 would fill a GPU."""
    return [plain.labels(model, part, text) for part in images.split(8)]


def large_picture(sizes: Sizes, device: torch.device) -> Work:
    model = new_model(sizes, device)
    text = unit(sizes.many, model.encoder.tower.output_dim).to(device)
    return partial(to_labels, model, torch.randn(1, 3, sizes.large, sizes.large), text)


def inference(sizes: Sizes, watch: Stopwatch) -> Iterator[Row]:
    """A window to labels (on a GPU 64), few classes and many; read-outs; float32, bf16; memory of a large picture."""
    device = watch.device
    images = torch.randn(sizes.windows, 3, sizes.side, sizes.side, device=device)
    model = new_model(sizes, device).requires_grad_(False)
    text = {count: unit(count, model.encoder.tower.output_dim).to(device) for count in (sizes.few, sizes.many)}
    cases: dict[str, Work] = {}
    against = {"bare encoder, bf16": "bare encoder, float32"}
    widths: dict[Precision, torch.dtype] = {"no": torch.float32, "bf16": torch.bfloat16}
    for precision, dtype in widths.items():
        width = str(dtype).removeprefix("torch.").replace("bfloat", "bf")
        narrow, bare = at_precision(model, precision), bare_encoder(model, sizes, dtype)
        cases[f"bare encoder, {width}"] = torch.inference_mode()(lambda bare=bare, dtype=dtype: bare(images.to(dtype)))
        for count, embeddings in text.items():
            cases[name := f"{count} classes, {width}"] = partial(to_labels, narrow, images, embeddings)
            against[name] = f"bare encoder, {width}"
        for name in readouts.OPTIONS:
            read = torch.inference_mode()(partial(read_out, narrow.encoder.visual, images, name))
            cases[f"read-out {name}, {width}"] = read
            if name != "plain":
                against[f"read-out {name}, {width}"] = f"read-out plain, {width}"
    for count, embeddings in text.items() if PLAIN.is_file() else ():
        plain = partial(plain_labels, plain_twins(), model, images, embeddings)
        cases[name := f"plain PyTorch, {count} classes, float32"] = plain
        against[name] = "bare encoder, float32"
    for row in watch.compare("inference", cases, against):
        yield row.with_rate("windows_per_second", len(images))
    name = f"{sizes.many} classes, picture of {sizes.large} x {sizes.large}, float32, above the weights"
    yield Row("inference", name, peak_gib=peak_memory(large_picture, sizes, device, device=device))


def drawn_labels(batch: int, side: int, values: list[int]) -> Tensor:
    """Label maps (B, S, S) of 16 x 16 blocks, in which every value occurs."""
    cells = torch.tensor(values).repeat(-(-256 // len(values)))[:256].view(1, 1, 16, 16)
    return F.interpolate(cells.float(), size=(side, side), mode="nearest")[0].long().repeat(batch, 1, 1)


def loss_and_gradient(who: str, sizes: Sizes, present: int, device: torch.device) -> Work:
    """The work that computes both, ours or the plain twin's, of labels that hold `present` of the C classes."""
    segmentation_loss = training.segmentation_loss if who == "our" else plain_twins().segmentation_loss
    torch.manual_seed(0)
    tokens = sizes.side // 16
    logits = 2 * torch.randn(sizes.loss_batch, sizes.loss_classes, tokens, tokens, device=device)  # (B, C, h, w)
    logits.requires_grad_()
    values = [i * sizes.loss_classes // present for i in range(present)]
    labels = drawn_labels(sizes.loss_batch, sizes.side, values).to(device)
    return lambda: torch.autograd.grad(segmentation_loss(logits, labels, "spt")["total"], logits)


def loss(sizes: Sizes, watch: Stopwatch) -> Iterator[Row]:
    """Loss and gradient against the plain twin: time and peak memory."""
    for present in (min(8, sizes.loss_classes // 2), sizes.loss_classes):
        case, what = (sizes, present, watch.device), f"loss, {sizes.loss_classes} classes, {present} present"
        works = {f"{who} {what}": loss_and_gradient(who, *case) for who in ("our", "plain")}
        ours, plain = (peak_memory(loss_and_gradient, who, *case, device=watch.device) for who in ("our", "plain"))
        one, other = watch.compare("loss", works, {f"our {what}": f"plain {what}"})
        yield replace(one, peak_gib=ours, extra={"memory_ratio": ours / plain})
        yield replace(other, peak_gib=plain)


class Trainer:
    """A model, an optimiser and a batch, ready for steps in the supervised setting."""

    def __init__(self, sizes: Sizes, classes: int, device: torch.device) -> None:
        self.precision: Precision = "bf16" if device.type == "cuda" else "no"
        self.config = training.TrainConfig(setting="supervised", batch_size=sizes.batch, precision=self.precision)
        names = [f"{colour} {name}" for colour in scenes.COLOURS for name in scenes.CLASSES]  # the tiny CLIP knows them
        self.split = Split.from_names("benchmark", names[:classes])
        self.accelerator = new_accelerator(self.precision, cpu=device.type == "cpu")
        self.model = new_model(sizes, device).train()
        self.trainee = training.Trainee(self.model, unit(classes, self.model.encoder.tower.output_dim).to(device))
        self.optimizer = torch.optim.AdamW(training.parameter_groups(self.model, 0.01), lr=1e-4, fused=True)
        self.images = torch.randn(sizes.batch, 3, sizes.side, sizes.side, device=device)
        self.labels = drawn_labels(sizes.batch, sizes.side, list(range(min(8, classes)))).to(device)

    def step(self) -> None:
        batch = [(self.images, self.labels)]
        training.step(self.accelerator, self.trainee, self.optimizer, batch, self.split, self.config)

    def plain_step(self, plain: SimpleNamespace) -> None:
        """The same in plain PyTorch, float32."""
        self.optimizer.zero_grad()
        logits = plain.mask_logits(self.model, self.images, self.trainee.text)
        plain.segmentation_loss(logits, self.labels, "spt")["total"].backward()
        self.optimizer.step()

    def rate_with_loading(self, sizes: Sizes) -> float:
        """Images a second in `fit`, which reads JPEG files of VOC's size, 500 x 375."""
        with TemporaryDirectory() as folder:
            for part in ("images", "masks"):
                Path(folder, part).mkdir()
            for seed in range(sizes.pictures):
                image, label = scenes.draw(seed, size=128)
                mask = Image.fromarray((label % len(self.split.classes)).astype("uint8"))
                Image.fromarray(image).resize((500, 375)).save(f"{folder}/images/{seed}.jpg")
                mask.resize((500, 375), Image.Resampling.NEAREST).save(f"{folder}/masks/{seed}.png")
            workers = training.PRESETS["voc"].train.workers  # the first steps are left out, in which they start
            config = replace(self.config, iterations=workers + sizes.steps, workers=workers, progress=False)
            rows = training.fit(self.model, ImageMaskFolder(folder, self.split), self.split, config).history
        return sizes.steps / sum(1 / row["images_per_second"] for row in rows[-sizes.steps :])


def training_step(sizes: Sizes, classes: int, device: torch.device) -> Work:
    return Trainer(sizes, classes, device).step


def training_steps(sizes: Sizes, watch: Stopwatch) -> Iterator[Row]:
    """A step of the optimiser against the bare encoder's forward pass; with loading, and what whole runs would take."""
    device = watch.device
    trainers = {f"step, batch {sizes.batch}, {n} classes": Trainer(sizes, n, device) for n in sizes.trained}
    first, *_ = trainers.values()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bare, name = bare_encoder(first.model, sizes, dtype), f"bare encoder, forward, batch {sizes.batch}"
    cases: dict[str, Work] = {name: torch.inference_mode()(lambda: bare(first.images.to(dtype)))}
    cases |= {case: trainer.step for case, trainer in trainers.items()}
    if PLAIN.is_file() and device.type == "cpu":
        cases["plain PyTorch, " + next(iter(trainers))] = partial(first.plain_step, plain_twins())
    for row in watch.compare("training", cases, dict.fromkeys([*cases][1:], name)):
        if trainer := trainers.get(row.case):
            peak = peak_memory(training_step, sizes, len(trainer.split.classes), device, device=device)
            row = replace(row.with_rate("images_per_second", sizes.batch), peak_gib=peak)
        yield row
    for trainer, presets in zip(trainers.values(), PRESETS, strict=False):
        rate = trainer.rate_with_loading(sizes)
        runs = {preset: training.PRESETS[preset].train for preset in presets}
        hours = {f"hours_{preset}": each.iterations * each.batch_size / rate / 3600 for preset, each in runs.items()}
        name = "steps, loading included" + (f", {len(trainer.split.classes)} classes" if trainer is not first else "")
        yield Row("training", name, extra={"images_per_second": rate, **hours})


SUITES = {"inference": inference, "training": training_steps, "loss": loss}


def benchmark(
    suites: tyro.conf.Positional[tuple[Suite, ...]] = (),
    quick: bool = False,
    threads: int | None = None,
    loss_batch: int | None = None,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Measures speed and memory as ratios within one run, on the GPU if there is one, and describes the machine.

    Args:
        suites: inference, training, loss; all by default.
        quick: tiny sizes, in seconds: whether it runs, not how fast.
        threads: of torch on the CPU.
        loss_batch: pictures in the loss suite; the plain twin needs about 4 GiB for each.
        json_file: write the figures there.
    """
    for name, value in {"threads": threads, "loss_batch": loss_batch}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; wanted at least 1")
    if json_file is not None:
        output_place(json_file)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = QUICK if quick else SIZES[device.type]
    sizes = replace(sizes, loss_batch=loss_batch or sizes.loss_batch)
    torch.set_num_threads(threads or torch.get_num_threads())
    about, rows = machine(device), []
    print(", ".join(f"{name} {value}" for name, value in about.items()), HEADER, sep="\n")
    for suite in suites or get_args(Suite):
        for row in SUITES[suite](sizes, Stopwatch(device, sizes.turns)):
            rows.append(asdict(row))
            print(row.line(), flush=True)
    if json_file is not None:
        write(json_file, json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
