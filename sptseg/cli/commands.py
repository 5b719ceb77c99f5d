"""The command line of sptseg. Options come from the dataclasses; every command explains itself with --help."""

from __future__ import annotations

import csv
import io
import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, TextIO

import torch
import tyro

from sptseg.checkpoints import EMBEDDED, import_research, load_model, save_model
from sptseg.cli import benchmark
from sptseg.cli.demo import demo
from sptseg.cli.train import Ablate, Train, clip_weights, print_left_out, with_preset
from sptseg.datasets import Data, Unreadable, check_dataset, contact_sheet, names, plots, sorted_images
from sptseg.inference import Precision, at_precision, by_training, evaluate, read_ahead, segment
from sptseg.interactive import explore, notebooks
from sptseg.model import DENSE_CLIP, SPT_RELEASED, TINY, SptSeg, build_model, load_clip
from sptseg.system import write
from sptseg.training import PretrainConfig, pretrain


@dataclass(frozen=True)
class Which:
    """Which model.

    Attributes:
        model: "embedded" (SPT-SEG on the tiny CLIP), "embedded-zegclip", "dense-clip" (no training), "untrained"
            (SPT-SEG with random prompts and decoder, to try sizes), or a checkpoint's path. Default: "embedded", or
            "dense-clip" if `clip` is given.
        clip: for "dense-clip" and "untrained": "tiny" or an open_clip model, such as ViT-B-16-quickgelu; for a
            checkpoint only if its CLIP's weights are a file.
        clip_weights: its weights: an open_clip tag such as openai (downloaded once), a file, or "none" for random ones.
        precision: the type of its weights: "bf16" and "fp16" are faster where the hardware has them, "no" is float32.
    """

    model: str = ""
    clip: str = ""
    clip_weights: str = ""
    precision: Precision = "no"

    def load(self) -> SptSeg:
        return at_precision(self.in_float32(), self.precision)

    def in_float32(self) -> SptSeg:
        if not self.clip:
            if self.clip_weights:
                raise ValueError(f"--clip-weights {self.clip_weights} needs --clip, such as ViT-B-16-quickgelu")
            if self.model == "untrained":
                return build_model(SPT_RELEASED).eval()
            return load_model(self.model or "embedded")
        presets = {"": DENSE_CLIP, "dense-clip": DENSE_CLIP, "untrained": SPT_RELEASED}
        if self.model in EMBEDDED:
            raise ValueError(f"model {self.model} has its own CLIP: leave out --clip, or take dense-clip or untrained")
        weights = clip_weights(self.clip, self.clip_weights)
        if self.model not in presets:
            return load_model(self.model, load_clip(self.clip, weights))
        size = (128, 128) if self.clip == "tiny" else (512, 512)
        return build_model(replace(presets[self.model], clip=self.clip, clip_weights=weights, image_size=size)).eval()


def evaluate_command(
    data: Annotated[Data, tyro.conf.arg(name="")],
    which: Annotated[Which, tyro.conf.arg(name="")],
    seen_offset: float | None = None,
    limit: int | None = None,
    skip_unreadable: bool = False,
    workers: int = 2,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Scores of a model on a data set: pixel accuracy, mIoU of seen and unseen classes, their harmonic mean.

    A model trained on other classes is told all names of this data set (cross-dataset evaluation). Seen and unseen are
    still this data set's; a second line tells apart the classes that have the name of one whose masks training showed.

    Args:
        data: the pictures.
        which: the model.
        seen_offset: what the scores of seen classes are lowered by; by default the model's own, 0 across data sets.
        limit: look at the first pictures only.
        skip_unreadable: leave out pictures that cannot be read, and list them, instead of stopping at the first.
        workers: processes that read ahead.
        json_file: write the scores there, each class's IoU too.
    """
    dataset, split = data.load("evaluation")
    model = which.load()
    shown, new = model.about.get("seen", ()), model.about.get("unseen", ())
    across = bool(shown) and {*shown, *new} != set(split.classes)
    seen_offset = 0.0 if across and seen_offset is None else seen_offset
    options = {"limit": limit, "skip_unreadable": skip_unreadable, "workers": workers}
    scores = evaluate(model, dataset, split, seen_offset=seen_offset, **options)
    report = scores.as_dict() | ({"left_out": list(scores.left_out)} if skip_unreadable else {})
    print(scores.table())
    print_left_out(scores.left_out)
    if across or set(shown) & set(split.names(split.unseen)):
        found = report["training"] = {"split": model.about["split"], **by_training(scores, shown)}
        all_of_them, old, others = (
            "-" if found[key] is None else f"{found[key]:.1%}" for key in ("miou", "miou_shown", "miou_new")
        )
        print(
            f"trained on {found['split']}: mIoU {all_of_them} of all classes, {old} of the {len(found['shown'])} whose "
            f"names training showed masks of, {others} of the others"
        )
    if model.config.clip == TINY and data.data != "scenes":
        print("The tiny CLIP never saw a photograph: on these pictures, unseen classes are not expected to work.")
    if json_file is not None:
        write(json_file, json.dumps(report, indent=1) + "\n")


def segment_command(
    pictures: tyro.conf.Positional[tuple[Path, ...]],
    classes: str,
    which: Annotated[Which, tyro.conf.arg(name="")],
    out: Path = Path("segmentation.png"),
    full_resolution: bool = False,
    skip_unreadable: bool = False,
) -> None:
    """Segments photographs into classes given by name.

    Args:
        pictures: image files, or folders of them.
        classes: names, comma-separated: "road, tree, car".
        which: the model.
        out: the picture to write; for several pictures a folder, which gets overlays, label PNGs and areas.csv.
        full_resolution: look at every pixel in many windows, instead of resizing the short side to one window.
        skip_unreadable: leave out pictures of a folder that cannot be read, and list them, instead of stopping there.
    """
    if not pictures:
        raise ValueError("no picture is named; wanted files or folders: sptseg segment street.jpg --classes ...")
    files = [file for path in pictures for file in (sorted_images(path) if path.is_dir() else [path])]
    results = [out] if out.suffix else [out / f"{file.stem}{end}" for file in files for end in (".png", "-labels.png")]
    taken = [path.resolve() for path in (*files, *results)]
    if len(set(taken)) < len(taken):
        raise ValueError("results would overwrite pictures or each other: give another --out, or rename pictures")
    model = which.load().to("cuda" if torch.cuda.is_available() else "cpu")
    if len(files) == 1 and out.suffix:
        result = segment(model, files[0], names(classes), full_resolution=full_resolution)
        result.save(out)
        print("\n".join(f"{share:7.1%}  {name}" for name, share in result.areas().items()))
        print(f"wrote {out}")
        return
    if out.suffix:
        raise ValueError(
            f"{len(files)} pictures do not fit into one file {out}: give a folder, such as --out "
            f"{shlex.quote(str(out.with_suffix('')))}"
        )
    table, left_out = io.StringIO(), []
    writer = csv.writer(table)
    writer.writerow(["picture", *names(classes)])
    for file, picture in zip(files, read_ahead(files), strict=True):
        try:
            result = segment(model, picture.result(), names(classes), full_resolution=full_resolution)
        except Unreadable as error:
            if not skip_unreadable:
                raise
            left_out.append(str(error))
            continue
        result.save(out / f"{file.stem}.png")
        result.save_labels(out / f"{file.stem}-labels.png")
        writer.writerow([file.name, *(f"{share:.4f}" for share in result.areas().values())])
        print(f"wrote {out / file.stem}.png")
    write(out / "areas.csv", table.getvalue())
    print_left_out(left_out)


def check_command(
    root: tyro.conf.Positional[str],
    data: Annotated[Data, tyro.conf.arg(name="")],
    limit: int | None = None,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Counts the pictures, sizes and classes of a data set, and names its faulty files.

    Args:
        root: the folder.
        data: how to read it.
        limit: look at the first pictures only.
        json_file: write the report there.
    """
    dataset, _ = replace(data, data=root).load("evaluation")
    report = check_dataset(dataset, limit=limit)
    print(report.table())
    if json_file is not None:
        write(json_file, json.dumps(report.as_dict(), indent=1) + "\n")
    if report.faults:
        raise ValueError(f"{len(report.faults)} files are faulty: {report.faults[0]}")


def show_command(
    root: tyro.conf.Positional[str],
    data: Annotated[Data, tyro.conf.arg(name="")],
    out: Path = Path("contact-sheet.png"),
    count: int = 12,
) -> None:
    """Writes a sheet of pictures beside their masks, with class names.

    Args:
        root: the folder.
        data: how to read it.
        out: the picture to write.
        count: how many pictures.
    """
    dataset, _ = replace(data, data=root).load("evaluation")
    plots.save_figure(contact_sheet(dataset, count, data.seed), out)
    print(f"wrote {out}")


def pretrain_command(
    output: Path = Path("tiny_clip.safetensors"), seed: int = 0, dense_losses: bool = True, images: int | None = None
) -> None:
    """Pre-trains the tiny CLIP on drawn pictures and their captions, on the CPU; goes on where a run stopped.

    Args:
        output: the file to write; the state and the history go beside it.
        seed: of the weights and the pictures.
        dense_losses: with the losses that make patches speak; without them CLIP's own contrast only, as a control.
        images: about how many pictures in all; by default as the embedded file was made.
    """
    config = PretrainConfig(seed=seed, dense_losses=dense_losses)
    if images is not None:
        config = config.scaled(images)
    pretrain(config, output)
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
        decoder_heads: attention heads of the decoder.
    """
    imported = import_research(checkpoint, image_size=image_size, heads=heads, decoder_heads=decoder_heads)
    print(f"{imported.report()}\nwrote {save_model(imported.model, output, {'imported_from': checkpoint.name})}")


COMMANDS = {
    "demo": demo,
    "data check": check_command,
    "data show": show_command,
    "evaluate": evaluate_command,
    "segment": segment_command,
    "benchmark": benchmark.benchmark,
    "explore": explore,
    "pretrain": pretrain_command,
    "import": import_command,
    "notebooks run": notebooks.run_notebooks,
    "notebooks check": notebooks.check_notebooks,
}


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
    def of(cls, stream: TextIO) -> TextIO:
        """The stream, through an outlet if it leads to a file; what its encoding lacks is printed as in \\u8349."""
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            if isinstance(getattr(stream.buffer, "raw", stream.buffer), io.FileIO):
                file = io.BufferedWriter(cls(stream.fileno(), "w", closefd=False))
                return io.TextIOWrapper(file, stream.encoding, stream.errors, line_buffering=True)
        return stream


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Bad input ends with one sentence on standard error and exit code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] in (["data"], ["notebooks"]):
        given[:2] = [" ".join(given[:2])]  # "data check" is one name to tyro
    Outlet.failure = None
    with redirect_stdout(Outlet.of(sys.stdout)), redirect_stderr(Outlet.of(sys.stderr)):
        try:
            if given[:1] in (["train"], ["ablate"]):
                with_preset(given[0], given[1:]).run()
            else:
                listed = {**COMMANDS, "train": Train, "ablate": Ablate}
                tyro.extras.subcommand_cli_from_dict(listed, args=given, prog="sptseg", description=__doc__)
            if Outlet.failure is not None:
                raise Outlet.failure
        except (ValueError, OSError, FloatingPointError) as error:
            print(f"sptseg: {' '.join(str(error).split())[:2000]}", file=sys.stderr)
            raise SystemExit(2) from error
        except KeyboardInterrupt:
            raise SystemExit(130) from None


if __name__ == "__main__":
    main()
