"""How fast and how small it is: ratios within one run, against the bare CLIP encoder and against plain PyTorch.

Absolute times differ from machine to machine and from minute to minute; so all that is compared runs in turns in one
process, and ratios are medians over the turns. Peak memory is measured in a process of its own for each case.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal, cast, get_args

import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor, nn

from sptseg import scenes
from sptseg.checkpoints import load_model
from sptseg.cli.measure import HEADER, Clock, Row, Stopwatch, Work, line, machine, peak_memory, utilisation
from sptseg.datasets import ImageMaskFolder, Split
from sptseg.datasets import scenes as scenes_split
from sptseg.inference import Precision, at_precision, new_accelerator, segment, window_logits
from sptseg.model import TINY, ModelConfig, SptSeg, build_model, resize_positions
from sptseg.system import cores, output_place, write
from sptseg.training import (
    VOC,
    Example,
    Positions,
    TrainConfig,
    Trainee,
    TrainingStream,
    label_table,
    loading,
    parameter_groups,
    segmentation_loss,
    step,
    training_augmentation,
)

Suite = Literal["inference", "training", "loss", "data", "widgets"]
PLAIN = Path(__file__).parents[2] / "tests" / "plain.py"


@dataclass(frozen=True)
class Sizes:
    """What is measured: the window's side, class counts, the large picture's side, the loss's and the step's batch."""

    clip: str = "ViT-B-16-quickgelu"
    side: int = 512
    few: int = 20
    many: int = 171
    large: int = 2048
    loss_batch: int = 1
    loss_classes: int = 156
    batch: int = 4
    repeats: int = 5
    pictures: int = 64


QUICK = Sizes(TINY, side=64, few=3, many=5, large=160, loss_classes=6, batch=2, repeats=2, pictures=4)


def plain_twins() -> ModuleType:
    """tests/plain.py of a clone: the model and its losses in plain PyTorch."""
    if not PLAIN.is_file():
        raise ValueError(f"the plain losses to compare with are missing ({PLAIN}); run the loss suite from a clone")
    spec = importlib.util.spec_from_file_location("plain", PLAIN)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unit(*size: int) -> Tensor:
    return F.normalize(torch.randn(*size), dim=-1)


def new_model(sizes: Sizes, device: torch.device) -> SptSeg:
    """SPT-SEG with random weights (the tiny CLIP has its own), always the same."""
    torch.manual_seed(0)
    return build_model(ModelConfig(clip=sizes.clip, image_size=(sizes.side, sizes.side))).to(device).eval()


def bare_encoder(model: SptSeg, sizes: Sizes, dtype: torch.dtype) -> nn.Module:
    """open_clip's own image tower, unchanged but for its positions, which it does not resize itself."""
    visual = deepcopy(model.encoder.visual)
    grid = model.encoder.grid_of(torch.empty(1, 3, sizes.side, sizes.side))
    positions = resize_positions(visual.positional_embedding, visual.grid_size, grid)
    visual.positional_embedding = nn.Parameter(positions, requires_grad=False)
    return visual.to(dtype)


def to_labels(model: SptSeg, images: Tensor, text: Tensor) -> list[Tensor]:
    size = (images.shape[-2], images.shape[-1])
    return [logits.labels(size) for logits in window_logits(model, images, text, window_batch=max(4, len(images)))]


def large_picture(sizes: Sizes, device: torch.device) -> Work:
    model = new_model(sizes, device)
    text = unit(sizes.many, model.encoder.visual.output_dim).to(device)
    images = torch.randn(1, 3, sizes.large, sizes.large)
    return lambda: to_labels(model, images, text)


def inference(sizes: Sizes, watch: Stopwatch) -> Iterator[Row]:
    """A window to labels (on a GPU 64), few classes and many, float32 and bf16; memory of a large picture."""
    device = watch.device
    images = torch.randn(64 if device.type == "cuda" else 1, 3, sizes.side, sizes.side, device=device)
    model = new_model(sizes, device).requires_grad_(False)
    text = {count: unit(count, model.encoder.visual.output_dim).to(device) for count in (sizes.few, sizes.many)}
    cases: dict[str, Work] = {}
    against: dict[str, str] = {}
    counted: dict[str, torch.dtype] = {}  # what is compiled, or fused into one kernel, is no countable product
    widths: dict[str, tuple[Precision, torch.dtype]] = {
        "float32": ("no", torch.float32),
        "bf16": ("bf16", torch.bfloat16),
    }
    for width, (precision, dtype) in widths.items():
        narrow, bare = at_precision(model, precision), bare_encoder(model, sizes, dtype)
        cases[f"bare encoder, {width}"] = torch.inference_mode()(lambda bare=bare, dtype=dtype: bare(images.to(dtype)))
        for count, embeddings in text.items():
            cases[name := f"{count} classes, {width}"] = lambda m=narrow, e=embeddings: to_labels(m, images, e)
            against[name], counted[name] = f"bare encoder, {width}", dtype
    against["bare encoder, bf16"] = "bare encoder, float32"
    if device.type == "cuda":  # on a CPU it takes minutes to compile, and gains little
        compiled = at_precision(model, "bf16")
        compiled.compile(dynamic=True)
        cases["compiled, bf16"] = lambda: to_labels(compiled, images, text[sizes.few])
        against["compiled, bf16"] = "bare encoder, bf16"
    if PLAIN.is_file():
        plain = torch.inference_mode()(plain_twins().labels)
        for count, embeddings in text.items():
            cases[name := f"plain PyTorch, {count} classes, float32"] = lambda e=embeddings: plain(model, images, e)
            against[name] = "bare encoder, float32"
    for row in watch.compare("inference", cases, against):
        assert row.seconds is not None
        dtype = counted.get(row.case)
        used = {} if dtype is None else utilisation(watch, cases[row.case], row.seconds, dtype)
        yield replace(row, extra={"windows_per_second": len(images) / row.seconds, **used})
    yield Row("inference", "labels that are equal in bf16 and float32", extra={"share": equal_labels(sizes, device)})
    name = f"{sizes.many} classes, picture of {sizes.large} x {sizes.large}, float32, above the weights"
    yield Row("inference", name, peak_gib=peak_memory(large_picture, sizes, device, device=device))


def equal_labels(sizes: Sizes, device: torch.device) -> float:
    """Share of pixels that the embedded model labels alike in bf16 and float32, on drawn scenes, all classes.

    The trained model counts: with random weights scores are near ties, and rounding decides.
    """
    model = load_model().to(device)
    narrow = at_precision(model, "bf16")
    names = scenes_split().classes
    equal = []
    for seed in range(sizes.pictures):
        wide, short = (segment(each, scenes.draw(seed)[0], names).labels for each in (model, narrow))
        equal.append(float((wide == short).mean()))
    return statistics.mean(equal)


def drawn_labels(batch: int, side: int, values: list[int]) -> Tensor:
    """Label maps (B, S, S) of blocks, in each of which every value occurs."""
    cells = torch.tensor(values).repeat(-(-256 // len(values)))[:256].view(16, 16)
    return (
        cells.repeat_interleave(-(-side // 16), 0)
        .repeat_interleave(-(-side // 16), 1)[:side, :side]
        .repeat(batch, 1, 1)
    )


def loss_case(sizes: Sizes, present: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mask logits (B, C, h, w) that want a gradient, and labels that hold `present` of the C classes."""
    torch.manual_seed(0)
    tokens = sizes.side // 16
    logits = 2 * torch.randn(sizes.loss_batch, sizes.loss_classes, tokens, tokens, device=device)
    values = [i * sizes.loss_classes // present for i in range(present)]
    return logits.requires_grad_(), drawn_labels(sizes.loss_batch, sizes.side, values).to(device)


def our_loss(sizes: Sizes, present: int, device: torch.device) -> Work:
    logits, labels = loss_case(sizes, present, device)
    return lambda: torch.autograd.grad(segmentation_loss(logits, labels, "spt")["total"], logits)[0]


def plain_loss(sizes: Sizes, present: int, device: torch.device) -> Work:
    (logits, labels), plain = loss_case(sizes, present, device), plain_twins()
    return lambda: torch.autograd.grad(plain.segmentation_loss(logits, labels, "spt")["total"], logits)[0]


def loss(sizes: Sizes, watch: Stopwatch) -> Iterator[Row]:
    """Loss and gradient against the plain twin: time, peak memory, and by how much they differ."""
    plain, device = plain_twins(), watch.device
    for present in (min(8, sizes.loss_classes // 2), sizes.loss_classes):
        ours, twin = our_loss(sizes, present, device), plain_loss(sizes, present, device)
        names = [f"{who}, {sizes.loss_classes} classes, {present} present" for who in ("our loss", "plain loss")]
        rows = watch.compare("loss", dict(zip(names, (ours, twin), strict=True)), {names[0]: names[1]})
        peaks = [peak_memory(make, sizes, present, device, device=device) for make in (our_loss, plain_loss)]
        case = loss_case(sizes, present, device)
        value, wanted = (f(*case, "spt")["total"].item() for f in (segmentation_loss, plain.segmentation_loss))
        gradient, expected = cast(Tensor, ours()), cast(Tensor, twin())
        apart = {"value": abs(value / wanted - 1), "gradient": float((gradient - expected).norm() / expected.norm())}
        yield replace(rows[0], peak_gib=peaks[0], extra={"memory_ratio": peaks[0] / peaks[1], **apart})
        yield replace(rows[1], peak_gib=peaks[1])


class Training:
    """A model, an optimiser and a batch, ready for steps in the supervised setting."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.batch = 16 if cuda else sizes.batch
        self.config = TrainConfig(setting="supervised", batch_size=self.batch, precision="bf16" if cuda else "no")
        self.split = Split.from_names("benchmark", [f"class {i}" for i in range(sizes.few)])
        self.accelerator = new_accelerator(self.config.precision, cpu=not cuda)
        self.model = new_model(sizes, device).train()
        text = unit(sizes.few, self.model.encoder.visual.output_dim).to(device)
        self.trainee = Trainee(self.model, text)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, 0.01), lr=1e-4, fused=True)
        self.images = torch.randn(self.batch, 3, sizes.side, sizes.side, device=device)
        self.labels = drawn_labels(self.batch, sizes.side, list(range(min(8, sizes.few)))).to(device)

    def step(self, images: Tensor | None = None, labels: Tensor | None = None) -> None:
        batch = (self.images, self.labels) if images is None or labels is None else (images, labels)
        step(self.accelerator, self.trainee, self.optimizer, [batch], self.split, self.config)

    def plain_step(self, plain: ModuleType) -> None:
        """The same in plain PyTorch, float32."""
        self.optimizer.zero_grad()
        logits = plain.mask_logits(self.model, self.images, self.trainee.text)
        plain.segmentation_loss(logits, self.labels, "spt")["total"].backward()
        self.optimizer.step()


def training_step(sizes: Sizes, device: torch.device) -> Work:
    return Training(sizes, device).step


def training(sizes: Sizes, watch: Stopwatch) -> Iterator[Row]:
    """A step of the optimiser against the bare encoder's forward pass; with loading, and what whole runs would take."""
    made = Training(sizes, watch.device)
    dtype = torch.bfloat16 if watch.device.type == "cuda" else torch.float32
    bare = bare_encoder(made.model, sizes, dtype)
    forward = torch.inference_mode()(lambda: bare(made.images.to(dtype)))
    names = (f"bare encoder, forward, batch {made.batch}", f"step, batch {made.batch}, {sizes.few} classes")
    cases, against = {names[0]: forward, names[1]: made.step}, {names[1]: names[0]}
    if PLAIN.is_file() and watch.device.type == "cpu":
        plain, name = plain_twins(), f"plain PyTorch, step, batch {made.batch}, {sizes.few} classes"
        cases[name], against[name] = lambda: made.plain_step(plain), names[0]
    rows = watch.compare("training", cases, against)
    seconds = rows[1].seconds
    assert seconds is not None
    yield rows[0]
    yield from rows[2:]
    extra = {"images_per_second": made.batch / seconds, **utilisation(watch, made.step, seconds, dtype)}
    yield replace(rows[1], extra=extra, peak_gib=peak_memory(training_step, sizes, watch.device, device=watch.device))
    with tempfile.TemporaryDirectory() as folder:
        loader = iter(stream_loader(Path(folder), made, sizes, workers=VOC.train.workers))
        steps = 2 * sizes.repeats if watch.device.type == "cpu" else 40

        def run() -> None:
            for _ in range(steps):
                batch = next(loader)
                made.step(batch.image, batch.target)

        run()
        rate = steps * made.batch / watch.wall(run)
    hours = {"hours_voc_20k": 20_000 * 16 / rate / 3600, "hours_coco_stuff_80k": 80_000 * 16 / rate / 3600}
    yield Row("training", "steps, loading included", extra={"images_per_second": rate, **hours})


def stream_loader(folder: Path, made: Training, sizes: Sizes, workers: int) -> Iterator[Example]:
    """Augmented training batches from JPEG files of VOC's size, 500 x 375."""
    for name in ("images", "masks"):
        (folder / name).mkdir(exist_ok=True)
    for seed in range(sizes.pictures):
        image, label = scenes.draw(seed, size=128)
        label = label % len(made.split.classes)
        Image.fromarray(image).resize((500, 375)).save(folder / "images" / f"{seed}.jpg")
        Image.fromarray(label.astype("uint8")).resize((500, 375), Image.Resampling.NEAREST).save(
            folder / "masks" / f"{seed}.png"
        )
    _, table = label_table(made.split, "supervised")
    dataset = ImageMaskFolder(folder, made.split)
    stream = TrainingStream(dataset, training_augmentation(made.model, made.config), table, 0)
    positions = Positions(range(10**6), made.batch, 1, 0, 1)
    return loading(stream, positions, workers, pin_memory=made.accelerator.device.type == "cuda")


def data(sizes: Sizes, watch: Stopwatch) -> Iterator[Row]:
    """Augmented training pictures a second: from files in one process and in several; drawn scenes."""
    made = Training(replace(sizes, clip=TINY), torch.device("cpu"))
    made.model.config = replace(made.model.config, image_size=(sizes.side, sizes.side))
    for workers in (0, cores()):
        with tempfile.TemporaryDirectory() as folder:
            loader = iter(stream_loader(Path(folder), made, sizes, workers))
            batches = max(2, sizes.pictures // made.batch)
            next(loader)
            taken = watch.wall(lambda loader=loader, batches=batches: [next(loader) for _ in range(batches)])
            rate = batches * made.batch / taken
            yield Row("data", f"crops of {sizes.side}, {workers} workers", extra={"images_per_second": rate})
            del loader
    taken = watch.wall(lambda: [scenes.draw(seed) for seed in range(sizes.pictures)])
    yield Row("data", "drawn scenes of 128", extra={"images_per_second": sizes.pictures / taken})


def widgets(sizes: Sizes, watch: Stopwatch) -> Iterator[Row]:
    """What one movement of the band explorer's slider takes: filtering at once, the masks after a pause."""
    try:
        from sptseg.interactive import FrequencyExplorer  # ipywidgets is an optional part
    except ImportError as error:
        raise ValueError("the widgets suite needs ipywidgets: pip install 'sptseg[notebooks]'") from error
    image, _ = scenes.draw(7, size=sizes.side)
    explorer = FrequencyExplorer(load_model(), image, ["tree", "sky", "grass", "house"])
    yield from watch.compare(
        "widgets", {"filter and show": explorer.update, "masks of the filtered picture": explorer.predict}, {}
    )


SUITES: dict[str, Callable[[Sizes, Stopwatch], Iterator[Row]]] = {
    "inference": inference,
    "training": training,
    "loss": loss,
    "data": data,
    "widgets": widgets,
}


def benchmark(
    suites: tyro.conf.Positional[tuple[Suite, ...]] = (),
    quick: bool = False,
    threads: int | None = None,
    clock: Clock = "wall",
    loss_batch: int | None = None,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Measures speed and memory as ratios within one run, on the GPU if there is one, and describes the machine.

    Args:
        suites: inference, training, loss, data, widgets; all by default.
        quick: tiny sizes, in seconds: whether it runs, not how fast.
        threads: of torch on the CPU.
        clock: "cpu" counts the process's CPU time, for machines that other programs use at the same time.
        loss_batch: pictures in the loss suite; the plain twin needs about 4 GiB for each.
        json_file: write the figures there.
    """
    if json_file is not None:
        output_place(json_file)
    sizes = QUICK if quick else Sizes()
    sizes = sizes if loss_batch is None else replace(sizes, loss_batch=loss_batch)
    if min(sizes.loss_batch, 1 if threads is None else threads) < 1:
        raise ValueError(f"threads is {threads} and loss_batch {loss_batch}; wanted at least 1")
    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = machine(device)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(HEADER)
    rows: list[Row] = []
    for suite in suites or get_args(Suite):
        for row in SUITES[suite](sizes, Stopwatch(device, sizes.repeats, clock)):
            rows.append(row)
            print(line(row), flush=True)
    if json_file is not None:
        write(
            json_file, json.dumps({"machine": about, "clock": clock, "rows": [asdict(row) for row in rows]}, indent=1)
        )
