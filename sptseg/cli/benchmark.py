"""How fast and how small it is: ratios within one run, against the bare CLIP encoder and against plain PyTorch.

Absolute times differ from machine to machine and from minute to minute; so all that is compared runs in turns in one
process, and ratios are medians over the turns. Peak memory is that above what a case begins with."""

import json
import logging
import multiprocessing
import platform
import re
import runpy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import psutil
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor, nn

from sptseg import scenes, training
from sptseg.datasets import ImageMaskFolder, Split
from sptseg.inference import Precision, at_precision, new_accelerator, window_logits
from sptseg.model import TINY, ModelConfig, SptSeg, build_model, read_out, readouts, resize_positions
from sptseg.system import cores, output_place, write

Suite = Literal["inference", "training", "loss"]
Work = Callable[[], object]
Row = dict[str, Any]
PLAIN = Path(__file__).parents[2] / "tests" / "plain.py"


@dataclass(frozen=True)
class Sizes:
    """A window's side, how many windows at once, class counts, batches; steps that are timed with loading."""

    clip: str = "ViT-B-16-quickgelu"
    side: int = 512
    windows: int = 1
    classes: tuple[int, int] = (20, 171)  # VOC, COCO-Stuff
    trained: int = 1  # on how many of these counts
    loss_batch: int = 1
    batch: int = 4
    steps: int = 6


SIZES = {"cpu": Sizes(), "cuda": Sizes(windows=64, trained=2, loss_batch=4, batch=16, steps=40)}
QUICK = Sizes(TINY, side=64, trained=2, batch=2, steps=2)
PRESETS = (("voc", "context"), ("coco-stuff",))  # with about so many classes as `Sizes.classes` says
TURNS, LOSS_CLASSES, PICTURES = 3, 156, 32


def wall_time(work: Work) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(cases: Mapping[str, tuple[Work, str]], pictures: int) -> Iterator[Row]:
    """Median seconds of each case, half the spread between quartiles, and the ratio to the case that it names. All run
    in turns, so what disturbs one turn disturbs all alike; once before, unmeasured. Each looks at `pictures`."""
    for work, _ in cases.values():
        wall_time(work)
    times = [{name: wall_time(work) for name, (work, _) in cases.items()} for _ in range(TURNS)]
    for name, (_, other) in cases.items():
        low, middle, high = statistics.quantiles([turn[name] for turn in times], n=4)
        row: Row = {"case": name, "seconds": middle, "spread": (high - low) / 2, "per_second": pictures / middle}
        if other != name:
            row |= {"ratio": statistics.median(turn[name] / turn[other] for turn in times), "against": other}
        yield row


def peak_memory(make: Callable[[], Work], device: torch.device) -> float:
    """GiB that the work which `make` returns needs at its peak, above what was there before it began.

    A GPU's allocator keeps count. On a CPU it is made and run in a process of its own, so `make` is a module's function
    with its arguments."""
    if device.type == "cuda":
        work = make()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**30
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_of_process, make, torch.get_num_threads()).result()


def peak_of_process(make: Callable[[], Work], threads: int) -> float:
    torch.set_num_threads(threads)
    work, process = make(), psutil.Process()
    taken = [process.memory_info().rss]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(work)
        while not running.done():
            time.sleep(0.003)
            taken.append(process.memory_info().rss)
    running.result()
    return (max(taken) - taken[0]) / 2**30


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    about = Path("/proc/cpuinfo")
    told = about.read_text() if about.is_file() else ""
    name = re.search(r"model name\s*: (.+)", told)
    return {
        "cpu": name[1] if name else platform.processor() or platform.machine(),
        **{flag: f" {flag} " in told for flag in ("avx512f", "avx512_bf16", "amx_tile")},
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
    }


def plain_twins() -> SimpleNamespace:
    """tests/plain.py of a clone: the model and its losses in plain PyTorch."""
    if not PLAIN.is_file():
        raise ValueError(f"the plain losses to compare with are missing ({PLAIN}); run the loss suite from a clone")
    return SimpleNamespace(**runpy.run_path(str(PLAIN)))


def new_model(sizes: Sizes, device: torch.device) -> SptSeg:
    """SPT-SEG with random weights (the tiny CLIP has its own), always the same."""
    torch.manual_seed(0)
    logging.disable(logging.WARNING)  # open_clip's: weights are random, as they are meant to be
    model = build_model(ModelConfig(clip=sizes.clip, image_size=(sizes.side, sizes.side)))
    logging.disable(logging.NOTSET)
    return model.to(device).eval()


def new_text(model: SptSeg, classes: int, device: torch.device) -> Tensor:
    return F.normalize(torch.randn(classes, model.encoder.tower.output_dim)).to(device)


def drawn_labels(batch: int, side: int, values: list[int]) -> Tensor:
    """Label maps (B, S, S) of 16 x 16 blocks, in which every value occurs."""
    cells = torch.tensor(values)[torch.arange(256) % len(values)].view(1, 1, 16, 16)
    return F.interpolate(cells.float(), size=(side, side), mode="nearest")[0].long().repeat(batch, 1, 1)


def bare_encoder(model: SptSeg, images: Tensor) -> Work:
    """The forward pass of open_clip's own image tower, but for its positions, which it does not resize itself."""
    visual: Any = deepcopy(model.encoder.visual)
    positions = resize_positions(visual.positional_embedding, visual.grid_size, model.encoder.grid_of(images))
    visual.positional_embedding = nn.Parameter(positions, requires_grad=False)
    return torch.inference_mode()(partial(visual.to(images.dtype), images))


def to_labels(model: SptSeg, images: Tensor, text: Tensor) -> list[Tensor]:
    size = (images.shape[-2], images.shape[-1])
    return [logits.labels(size) for logits in window_logits(model, images, text, window_batch=max(4, len(images)))]


def large_picture(sizes: Sizes, side: int, device: torch.device) -> Work:
    model = new_model(sizes, device)
    return partial(to_labels, model, torch.randn(1, 3, side, side), new_text(model, sizes.classes[-1], device))


def inference(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """A window to labels (on a GPU 64), few classes and many; read-outs; float32, bf16; memory of a large picture."""
    images = torch.randn(sizes.windows, 3, sizes.side, sizes.side, device=device)
    model = new_model(sizes, device).requires_grad_(False)
    text = {count: new_text(model, count, device) for count in sizes.classes}
    cases: dict[str, tuple[Work, str]] = {}
    precisions: dict[Precision, torch.dtype] = {"no": torch.float32, "bf16": torch.bfloat16}
    for precision, dtype in precisions.items():
        width = "float32" if precision == "no" else precision
        narrow, bare = at_precision(model, precision), f"bare encoder, {width}"
        cases[bare] = bare_encoder(model, images.to(dtype)), "bare encoder, float32"
        for count, embeddings in text.items():
            cases[f"{count} classes, {width}"] = partial(to_labels, narrow, images, embeddings), bare
        for name in readouts.OPTIONS:
            read = torch.inference_mode()(partial(read_out, narrow.encoder.visual, images, name))
            cases[f"read-out {name}, {width}"] = read, f"read-out plain, {width}"
    if PLAIN.is_file():
        plain, parts = plain_twins(), images.split(8)  # a few windows at a time: all maps of 64 would fill a GPU
        for count, embeddings in text.items():
            work = partial(lambda text: [plain.labels(model, part, text) for part in parts], embeddings)
            cases[f"plain PyTorch, {count} classes, float32"] = work, "bare encoder, float32"
    yield from compare(cases, len(images))
    side = 4 * sizes.side
    name = f"{sizes.classes[-1]} classes, picture of {side} x {side}, float32, above the weights"
    yield {"case": name, "peak_gib": peak_memory(partial(large_picture, sizes, side, device), device)}


def loss_and_gradient(who: str, sizes: Sizes, present: int, device: torch.device) -> Work:
    """The work that computes both, ours or the plain twin's, of labels that hold `present` of the C classes."""
    segmentation_loss = training.segmentation_loss if who == "our" else plain_twins().segmentation_loss
    torch.manual_seed(0)
    tokens = sizes.side // 16
    logits = 2 * torch.randn(sizes.loss_batch, LOSS_CLASSES, tokens, tokens, device=device)  # (B, C, h, w)
    logits.requires_grad_()
    values = [i * LOSS_CLASSES // present for i in range(present)]
    labels = drawn_labels(sizes.loss_batch, sizes.side, values).to(device)
    return lambda: torch.autograd.grad(segmentation_loss(logits, labels, "spt")["total"], logits)


def loss(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Loss and gradient against the plain twin: time and peak memory."""
    for present in (8, LOSS_CLASSES):
        what = f"loss, {LOSS_CLASSES} classes, {present} present"
        makes = {f"{who} {what}": partial(loss_and_gradient, who, sizes, present, device) for who in ("our", "plain")}
        ours, plain = (peak_memory(make, device) for make in makes.values())
        cases = {name: (make(), f"plain {what}") for name, make in makes.items()}
        our_row, plain_row = compare(cases, sizes.loss_batch)
        yield our_row | {"peak_gib": ours, "memory_ratio": ours / plain}
        yield plain_row | {"peak_gib": plain}


def supervised(sizes: Sizes, classes: int, device: torch.device) -> tuple[training.TrainConfig, Split]:
    """The setting that all steps are timed in, with names that the tiny CLIP knows."""
    precision: Precision = "bf16" if device.type == "cuda" else "no"
    config = training.TrainConfig(setting="supervised", batch_size=sizes.batch, precision=precision)
    names = [f"{colour} {name}" for colour in scenes.COLOURS for name in scenes.CLASSES]
    return config, Split.from_names("benchmark", names[:classes])


def training_step(who: str, sizes: Sizes, classes: int, device: torch.device) -> Work:
    """A step of the optimiser, ours or plain PyTorch's in float32, on a batch of noise."""
    config, split = supervised(sizes, classes, device)
    model = new_model(sizes, device).train()
    text = new_text(model, classes, device)
    optimizer = torch.optim.AdamW(training.parameter_groups(model, 0.01), lr=1e-4, fused=True)
    images = torch.randn(sizes.batch, 3, sizes.side, sizes.side, device=device)
    labels = drawn_labels(sizes.batch, sizes.side, list(range(8))).to(device)
    if who == "our":
        trainee, batches = training.Trainee(model, text), [(images, labels)]
        accelerator = new_accelerator(config.precision, cpu=device.type == "cpu")
        return lambda: training.step(accelerator, trainee, optimizer, batches, split, config)
    plain = plain_twins()

    def step() -> None:
        optimizer.zero_grad()
        plain.segmentation_loss(plain.mask_logits(model, images, text), labels, "spt")["total"].backward()
        optimizer.step()

    return step


def rate_with_loading(sizes: Sizes, classes: int, device: torch.device) -> float:
    """Images a second in `fit`, which reads JPEG files of VOC's size, 500 x 375."""
    config, split = supervised(sizes, classes, device)
    with TemporaryDirectory() as folder:
        for part in ("images", "masks"):
            Path(folder, part).mkdir()
        for seed in range(PICTURES):
            image, label = scenes.draw(seed, size=128)
            mask = Image.fromarray((label % classes).astype("uint8"))
            Image.fromarray(image).resize((500, 375)).save(f"{folder}/images/{seed}.jpg")
            mask.resize((500, 375), Image.Resampling.NEAREST).save(f"{folder}/masks/{seed}.png")
        workers = training.PRESETS["voc"].train.workers  # the first steps are left out, in which they start
        config = replace(config, iterations=workers + sizes.steps, workers=workers, progress=False)
        rows = training.fit(new_model(sizes, device), ImageMaskFolder(folder, split), split, config).history
    return sizes.steps / sum(1 / row["images_per_second"] for row in rows[-sizes.steps :])


def training_steps(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """A step of the optimiser against the bare encoder's forward pass; with loading, and what whole runs would take."""
    counts, dtype = sizes.classes[: sizes.trained], torch.bfloat16 if device.type == "cuda" else torch.float32
    images = torch.randn(sizes.batch, 3, sizes.side, sizes.side, device=device, dtype=dtype)
    bare = f"bare encoder, forward, batch {sizes.batch}"
    makes = {f"step, batch {sizes.batch}, {n} classes": partial(training_step, "our", sizes, n, device) for n in counts}
    cases = {bare: (bare_encoder(new_model(sizes, device), images), bare)}
    cases |= {name: (make(), bare) for name, make in makes.items()}
    if PLAIN.is_file() and device.type == "cpu":
        cases[f"plain PyTorch, {next(iter(makes))}"] = training_step("plain", sizes, counts[0], device), bare
    for row in compare(cases, sizes.batch):
        make = makes.get(row["case"])
        yield row | ({"peak_gib": peak_memory(make, device)} if make else {})
    for count, presets in zip(counts, PRESETS, strict=False):
        rate = rate_with_loading(sizes, count, device)
        runs = {preset: training.PRESETS[preset].train for preset in presets}
        hours = {f"hours_{name}": run.iterations * run.batch_size / rate / 3600 for name, run in runs.items()}
        yield {"case": f"steps, loading included, {count} classes", "per_second": rate, **hours}


SUITES = {"inference": inference, "training": training_steps, "loss": loss}


def line(suite: str, case: str, **figures: Any) -> str:
    """A row of a table in Markdown."""
    told = [f"{name} {value if name == 'against' else f'{value:.3g}'}" for name, value in figures.items()]
    return f"| {suite} | {case} | {', '.join(told).replace('_', ' ')} |"


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
        json_file: write the figures there."""
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
    print(", ".join(f"{name} {value}" for name, value in about.items()), "| suite | case | |\n|---|---|---|", sep="\n")
    for suite in suites or SUITES:
        for row in SUITES[suite](sizes, device):
            rows.append({"suite": suite, **row})
            print(line(**rows[-1]), flush=True)
    if json_file is not None:
        write(json_file, json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
