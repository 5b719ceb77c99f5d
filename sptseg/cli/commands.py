"""The command line of sptseg. Options come from the dataclasses; every command explains itself with --help."""

import io
import json
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar, TextIO, Union

import pandas as pd
import torch
import tyro

from sptseg.checkpoints import import_report, import_research_checkpoint, save_model
from sptseg.cli.benchmark import benchmark
from sptseg.cli.demo import demo
from sptseg.cli.train import Ablate, Train, with_preset
from sptseg.cli.which import TRAINING_FREE, Which
from sptseg.datasets import WORDS, Data, Note, as_array, check_dataset, names, plots, show_samples, sorted_images, where
from sptseg.inference import CocoMasks, by_training, evaluate, segment
from sptseg.interactive import explore, notebooks
from sptseg.model import EMBEDDED_CLIPS, synonyms
from sptseg.system import is_main_process, one_voice, output_place, processes, write
from sptseg.training import PretrainConfig, beside_published, pretrain, retrieval

Pictures = Annotated[Data, tyro.conf.arg(name="")]
JsonFile = Annotated[Path | None, tyro.conf.arg(name="json")]


def evaluate_command(
    data: Pictures,
    which: Annotated[Which, tyro.conf.arg(name="")],
    seen_offset: float | None = None,
    limit: int | None = None,
    workers: int = 2,
    json_file: JsonFile = None,
) -> None:
    """Scores of a model on a data set: pixel accuracy, mIoU of seen and unseen classes, their harmonic mean.

    A model trained on other classes is told all names of this data set (cross-dataset evaluation). Seen and unseen are
    still this data set's; a second line tells apart the classes that have the name of one whose masks training showed.

    Args:
        data: the pictures.
        which: the model.
        seen_offset: what the scores of seen classes are lowered by; by default the model's own, 0 across data sets.
        limit: look at the first pictures only.
        workers: processes that read ahead.
        json_file: write the scores there, each class's IoU too."""
    if json_file is not None:
        output_place(json_file)
    if seen_offset is not None and not abs(seen_offset) <= 1:
        raise ValueError(f"--seen-offset is {seen_offset}; wanted -1 to 1, as scores are 0 to 1")
    if which.model == TRAINING_FREE and data.layout in WORDS and not data.prompts:
        data = replace(data, prompts=WORDS[data.layout])
        print(f"words of the usual recipe: {data.prompts}")
    dataset, split = data.load("evaluation")
    model = which.load(data.layout)
    shown, new = model.about.get("seen", ()), model.about.get("unseen", ())
    across = bool(shown) and {*shown, *new} != set(split.classes)
    seen_offset = 0.0 if across and seen_offset is None else seen_offset
    scores = evaluate(model, dataset, split, seen_offset=seen_offset, limit=limit, workers=workers)
    report = scores.as_dict()
    print(scores.table())
    if across or set(shown) & set(split.names(split.unseen)):
        found = report["training"] = {"split": model.about["split"], **by_training(scores, shown)}
        miou = {key: "-" if value is None else f"{value:.1%}" for key, value in found.items() if "miou" in key}
        print(
            f"trained on {found['split']}: mIoU {miou['miou']} of all classes, {miou['miou_shown']} of the "
            f"{len(found['shown'])} whose names training showed masks of, {miou['miou_new']} of the others"
        )
    if limit is None:
        for line in beside_published(model.config, data.layout, by_training(scores, ())["miou"]):
            print(line)
    if model.config.clip in EMBEDDED_CLIPS and data.data != "scenes":
        print("The tiny CLIP never saw a photograph: on these pictures, unseen classes are not expected to work.")
    if json_file is not None and is_main_process():
        write(json_file, json.dumps(report, indent=1) + "\n")


def segment_command(
    pictures: tyro.conf.Positional[tuple[Path, ...]],
    classes: str,
    which: Annotated[Which, tyro.conf.arg(name="")],
    background: str = "",
    out: Path = Path("segmentation.png"),
    full_resolution: bool = False,
    max_pixels: int | None = None,
) -> None:
    """Segments photographs into classes given by name.

    Beside each picture with its masks go label PNGs, scores at the model's own resolution (.npz), the names of the
    labels and all masks as COCO JSON. Pictures that cannot be read are left out and named; the exit code is 2 then.

    Args:
        pictures: image files, or folders of them.
        classes: names, comma-separated, and other words for the same between bars: "road, tree, car|automobile". A
            single one is a question of yes or no.
        which: the model.
        background: what is none of the classes, and gets label 255: words for it, such as "sky, wall"; "usual" for 26
            words from SCLIP's evaluation (which are printed); or the score that a class must reach, such as 0.3.
            Without it every pixel gets a class; with a single class it is "usual".
        out: the picture to write; for several pictures a folder, which gets areas.csv too.
        full_resolution: look at every pixel in many windows, instead of resizing the short side to one window.
        max_pixels: pictures with more pixels are refused; by default with more than 89 millions."""
    if not pictures:
        raise ValueError("no picture is named; wanted files or folders: sptseg segment street.jpg --classes ...")
    files = [file for path in pictures for file in (sorted_images(path) if path.is_dir() else [path])]
    if out.suffix and len(files) != 1:
        folder = shlex.quote(str(out.with_suffix("")))
        raise ValueError(f"{len(files)} pictures do not fit into one file {out}: give a folder, such as --out {folder}")
    folder, beside = (out.parent, f"{out.stem}-") if out.suffix else (out, "")
    ends = (out.suffix or ".png", "-labels.png", "-scores.npz")
    results = [[folder / f"{(out if out.suffix else file).stem}{end}" for end in ends] for file in files]
    coco_json, names_json, areas_csv = (folder / f"{beside}{name}" for name in ("coco.json", "names.json", "areas.csv"))
    taken = [os.path.realpath(path) for path in (*files, *chain(*results), coco_json, names_json, areas_csv)]
    if len(set(taken)) < len(taken):
        raise ValueError("results would overwrite pictures or each other: give another --out, or rename pictures")
    (plots.picture_place if out.suffix else partial(output_place, folder=True))(out)
    model = which.load().to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    told = names(classes)
    chosen = background or ("usual" if len(told) == 1 else None)
    masks, rows, unread = CocoMasks([synonyms(name)[0] for name in told]), [], []
    for file, (picture, labels, scores) in zip(files, results, strict=True):
        try:
            pixels = as_array(file, max_pixels)
        except OSError as error:
            if out.suffix:
                raise
            unread.append(str(error))
            print(f"left out: {error}")
            continue
        result = segment(model, pixels, told, background=chosen, full_resolution=full_resolution)
        if not rows:
            write(names_json, json.dumps(result.named, indent=1, ensure_ascii=False) + "\n")
            if isinstance(result.background, tuple):
                print(f"none stands for {', '.join(result.background)}")
        result.save(picture)
        result.save_labels(labels)
        result.save_scores(scores)
        masks.add(file.name, result.labels)
        rows.append({"picture": file.name, **{name: f"{share:.4f}" for name, share in result.areas().items()}})
        if out.suffix:
            print("\n".join(f"{share:7.1%}  {name}" for name, share in result.areas().items()))
        print(f"wrote {picture}")
    write(coco_json, masks.json())
    if out.suffix:
        print(f"wrote beside it {', '.join(each.name for each in (labels, scores, coco_json, names_json))}")
        return
    write(areas_csv, pd.DataFrame(rows, columns=None if rows else ["picture"]).to_csv(index=False))
    if unread:
        raise ValueError(f"{len(unread)} of {len(files)} pictures cannot be read, and were left out: {unread[0]}")


def in_folder(root: str, data: Data) -> Data:
    """The data that `data check` and `data show` name by their folder alone."""
    if data.data != Data.data:
        raise ValueError(f"two folders are named, {root} and --data {data.data}; leave out one of them")
    return replace(data, data=root)


def check_command(
    root: tyro.conf.Positional[str], data: Pictures, limit: int | None = None, json_file: JsonFile = None
) -> None:
    """Counts the pictures, sizes and classes of a data set, and names its faulty files.

    Args:
        root: the folder.
        data: how to read it.
        limit: look at that many pictures only, spread evenly.
        json_file: write the report there."""
    if json_file is not None:
        output_place(json_file)
    report = check_dataset(in_folder(root, data).load("evaluation")[0], limit=limit)
    print(report.table())
    if json_file is not None:
        write(json_file, json.dumps(report.as_dict(), indent=1) + "\n")
    if report.faults:
        raise ValueError(f"{len(report.faults)} files are faulty: {report.faults[0]}")


def show_command(
    root: tyro.conf.Positional[str], data: Pictures, out: Path = Path("contact-sheet.png"), count: int = 12
) -> None:
    """Writes a sheet of pictures beside their masks, with class names.

    Args:
        root: the folder.
        data: how to read it.
        out: the picture to write.
        count: how many pictures."""
    plots.picture_place(out)
    dataset, _ = in_folder(root, data).load("evaluation")
    plots.save_figure(show_samples(dataset, count, data.seed), out)
    print(f"wrote {out}")


def pretrain_command(
    output: Path = Path("tiny_clip.safetensors"),
    seed: int = 0,
    dense_losses: bool = True,
    images: int | None = None,
    device: str = "cpu",
) -> None:
    """Pre-trains the tiny CLIP on drawn pictures and their captions; goes on where a run stopped.

    Args:
        output: the file to write; the state and the history go beside it.
        seed: of the weights and the pictures.
        dense_losses: with the losses that make patches speak; without them CLIP's own contrast only, as a control.
        images: about how many pictures in all; by default as the embedded file was made.
        device: what computes: cpu or cuda."""
    config = replace(PretrainConfig(seed) if dense_losses else PretrainConfig.plain(seed), device=device)
    if images is not None:
        config = config.scaled(images)
    clip = pretrain(config, output)
    print(f"of 100 fresh scenes' captions the right one is the closest for {retrieval(clip):.1%}")
    print(f"wrote {output}; use it with --clip tiny --clip-weights {shlex.quote(str(output))}")


def import_command(
    checkpoint: tyro.conf.Positional[Path], output: Path, image_size: int = 512, heads: int = 12, decoder_heads: int = 8
) -> None:
    """Imports a checkpoint of SPT-SEG's or ZegCLIP's research code (.pth or .safetensors) and says what it left out.

    Args:
        checkpoint: the file.
        output: the checkpoint to write.
        image_size: side of the training crop.
        heads: attention heads of the image encoder.
        decoder_heads: attention heads of the decoder."""
    output_place(output, folder=output.suffix != ".safetensors")
    model = import_research_checkpoint(checkpoint, image_size=image_size, heads=heads, decoder_heads=decoder_heads)
    saved = save_model(model, output, {**model.about, "imported_from": checkpoint.name})
    print(f"{import_report(model)}\nwrote {saved}")


COMMANDS: dict[str, Any] = {
    "demo": demo,
    "data check": check_command,
    "data show": show_command,
    "data where": where,
    "evaluate": evaluate_command,
    "segment": segment_command,
    "benchmark": benchmark,
    "explore": explore,
    "pretrain": pretrain_command,
    "import": import_command,
    "notebooks run": notebooks.run_notebooks,
    "notebooks check": notebooks.check_notebooks,
    "train": Train,
    "ablate": Ablate,
}
IN_SEVERAL_PROCESSES = ("train", "ablate", "evaluate")  # what torchrun and accelerate launch may start


class Outlet(io.FileIO):
    """A standard stream whose failures wait: work goes on when its reader has left (`| head`) or its disk is full."""

    failure: ClassVar[OSError | None] = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                Outlet.failure = OSError(f"what was printed is not whole: {error.strerror}")
            return len(data)

    @classmethod
    def of(cls, stream: TextIO | None) -> TextIO:
        """The stream, through an outlet if it leads to a file, and one for nobody if it is closed (`2>&-`); what its
        encoding lacks is printed as in \\u8349."""
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            if isinstance(getattr(stream.buffer, "raw", stream.buffer), io.FileIO):
                file = io.BufferedWriter(cls(stream.fileno(), "w", closefd=False))
                return io.TextIOWrapper(file, stream.encoding, stream.errors, line_buffering=True)
        return stream or io.StringIO()


@contextmanager
def notes_told_once() -> Iterator[None]:
    """What is noted of pictures goes to standard error, a line each, with the first picture it is said of."""
    told, otherwise = set(), warnings.showwarning

    def tell(message: Warning | str, *where: Any, **more: Any) -> None:
        if not isinstance(message, Note):
            otherwise(message, *where, **more)
        elif message.args[1] not in told:
            told.add(message.args[1])
            print(f"note: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", Note)
        warnings.showwarning = tell
        yield


def run(given: Sequence[str]) -> None:
    """Runs the command that is named; of a group of commands, or of all, says which there are."""
    for name, command in COMMANDS.items():
        words = name.split()
        if list(given[: len(words)]) == words:
            if processes() > 1 and name not in IN_SEVERAL_PROCESSES:
                raise ValueError(f"sptseg {name} works in one process; start it without torchrun or accelerate launch")
            if command in (Train, Ablate):
                return with_preset(name, given[1:]).run()
            return tyro.cli(command, args=given[len(words) :], prog=f"sptseg {name}")
    group = f"{given[0]} " if given and any(name.startswith(f"{given[0]} ") for name in COMMANDS) else ""
    listed = {name.removeprefix(group): command for name, command in COMMANDS.items() if name.startswith(group)}
    kinds = [
        Annotated[Any, tyro.conf.subcommand(name, description=command.__doc__.partition("\n")[0], constructor=command)]
        for name, command in listed.items()
    ]
    named: Any = Union[tuple(kinds)]  # noqa: UP007
    about = "Every command explains itself with --help."
    tyro.cli(named, args=given[bool(group) :], prog=f"sptseg {group}".strip(), description=about)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Bad input ends with one sentence on standard error and exit code 2."""
    Outlet.failure = None
    with redirect_stdout(Outlet.of(sys.stdout)), redirect_stderr(Outlet.of(sys.stderr)), one_voice(), notes_told_once():
        try:
            run(sys.argv[1:] if arguments is None else arguments)
            if Outlet.failure is not None:
                raise Outlet.failure
        except (ValueError, OSError, FloatingPointError, OverflowError, MemoryError) as error:
            said = str(error) or "memory ran out"
            print(f"sptseg: {' '.join(said.split())[:2000]}", file=sys.stderr)
            raise SystemExit(2) from error
        except KeyboardInterrupt:
            raise SystemExit(130) from None
