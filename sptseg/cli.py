"""The command line of sptseg. Options come from the dataclasses; every command explains itself with --help."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from sptseg.ablation import CONFIGURATIONS, ablate
from sptseg.checkpoints import import_research, save_model
from sptseg.clip import TINY
from sptseg.datacheck import check, contact_sheet
from sptseg.datasets import IMAGE_SUFFIXES
from sptseg.demo import demo
from sptseg.hub import load_model
from sptseg.inference import segment
from sptseg.model import EMBEDDED_CONFIG, SPT_RELEASED, ZEGCLIP, ModelConfig, build_model
from sptseg.options import SCENES_TO_SCORE, SCENES_TO_TRAIN, Data, Which, clip_weights, names
from sptseg.preflight import preflight
from sptseg.pretraining import PretrainConfig, pretrain
from sptseg.training import EMBEDDED_TRAINING, TrainConfig, evaluate, fit

PRESETS = {"embedded": EMBEDDED_CONFIG, "spt": SPT_RELEASED, "zegclip": ZEGCLIP}


def evaluate_command(
    data: Annotated[Data, tyro.conf.arg(name="")],
    which: Annotated[Which, tyro.conf.arg(name="")],
    seen_offset: float | None = None,
    limit: int | None = None,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Scores of a model on a data set: pixel accuracy, mIoU of seen and unseen classes, their harmonic mean.

    Args:
        data: the pictures.
        which: the model.
        seen_offset: what the scores of seen classes are lowered by; the model's own by default.
        limit: look at the first pictures only.
        json_file: write the scores there, each class's IoU too.
    """
    dataset, split = data.load("evaluation")
    model = which.load()
    scores = evaluate(model, dataset, split, seen_offset=seen_offset, limit=limit)
    print(scores.table())
    if model.config.clip == TINY and data.data != "scenes":
        print("The tiny CLIP never saw a photograph: on these pictures, unseen classes are not expected to work.")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(scores.as_dict(), indent=1) + "\n")


@dataclass(frozen=True)
class Train:
    """Train on a data set; writes the trained parts, the history and the settings to a folder.

    Attributes:
        output: the folder.
        preset: what the model's options start from: "embedded" (SPT-SEG as it transfers best to the tiny CLIP), "spt"
            (as released) or "zegclip".
        start_from: a checkpoint to continue from, for transductive training; its configuration counts.
        resume: go on from the state in `output`.
        preflight_only: check data, classes, targets and one step, write the first batch as a picture, and stop.
        data: the pictures; validation looks at the layout's validation subset, or in a plain folder at the same ones.
        model: the model's options.
        train: the training's options.
    """

    output: Path
    preset: Literal["embedded", "spt", "zegclip"] = "embedded"
    start_from: str = ""
    resume: bool = False
    preflight_only: bool = False
    data: Annotated[Data, tyro.conf.arg(name="")] = SCENES_TO_TRAIN
    model: Annotated[ModelConfig, tyro.conf.arg(name="")] = EMBEDDED_CONFIG
    train: TrainConfig = EMBEDDED_TRAINING

    def run(self) -> None:
        dataset, split = self.data.load("training")
        validation = replace(self.data, subset="").load("evaluation")[0] if self.train.validate_every else None
        torch.manual_seed(self.train.seed)
        if self.start_from:
            model = load_model(self.start_from)
        else:
            weights = clip_weights(self.model.clip, self.model.clip_weights or "")
            model = build_model(replace(self.model, clip_weights=weights))
        report = preflight(model, dataset, split, self.train, folder=self.output)
        print(report.text())
        report.raise_on_fault()
        if self.preflight_only:
            return
        fit(model, dataset, split, self.train, output=self.output, validation=validation, resume=self.resume)
        print(f"the trained model is in {self.output}; score it with: sptseg evaluate --model {self.output}")


def train_command(arguments: Sequence[str]) -> None:
    """Parses `train` with the preset's values as defaults."""
    chooser = tyro.cli(Preset, args=list(arguments), return_unknown_args=True, add_help=False)[0]
    default = Train(output=tyro.MISSING, preset=chooser.preset, model=PRESETS[chooser.preset])
    tyro.cli(Train, args=list(arguments), default=default, prog="sptseg train").run()


@dataclass(frozen=True)
class Preset:
    """Only the option that decides the defaults of the others."""

    preset: Literal["embedded", "spt", "zegclip"] = "embedded"


def segment_command(
    pictures: tyro.conf.Positional[tuple[Path, ...]],
    classes: str,
    which: Annotated[Which, tyro.conf.arg(name="")],
    out: Path = Path("segmentation.png"),
    full_resolution: bool = False,
) -> None:
    """Segments photographs into classes given by name.

    Args:
        pictures: image files, or folders of them.
        classes: names, comma-separated: "road, tree, car".
        which: the model.
        out: the picture to write; for several pictures a folder, which gets overlays, label PNGs and areas.csv.
        full_resolution: look at every pixel in many windows, instead of resizing the short side to one window.
    """
    files = [file for path in pictures for file in (sorted_images(path) if path.is_dir() else [path])]
    results = [out] if out.suffix else [out / f"{file.stem}{end}" for file in files for end in (".png", "-labels.png")]
    taken = [path.resolve() for path in (*files, *results)]
    if len(set(taken)) < len(taken):
        raise ValueError("results would overwrite pictures or each other: give another --out, or rename pictures")
    model = which.load()
    if len(files) == 1 and out.suffix:
        out.parent.mkdir(parents=True, exist_ok=True)
        result = segment(model, files[0], names(classes), full_resolution=full_resolution)
        result.save(out)
        print("\n".join(f"{share:7.1%}  {name}" for name, share in result.areas().items()))
        print(f"wrote {out}")
        return
    if out.suffix:
        raise ValueError(
            f"{len(files)} pictures do not fit into one file {out}: give a folder, such as --out {out.with_suffix('')}"
        )
    out.mkdir(parents=True, exist_ok=True)
    with (out / "areas.csv").open("w", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(["picture", *names(classes)])
        for file in files:
            result = segment(model, file, names(classes), full_resolution=full_resolution)
            result.save(out / f"{file.stem}.png")
            result.save_labels(out / f"{file.stem}-labels.png")
            writer.writerow([file.name, *(f"{share:.4f}" for share in result.areas().values())])
            print(f"wrote {out / file.stem}.png")


def sorted_images(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise FileNotFoundError(f"{folder} holds no pictures; wanted files ending in {', '.join(IMAGE_SUFFIXES)}")
    return files


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
    report = check(dataset, limit=limit)
    print(report.table())
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_dict(), indent=1) + "\n")
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
    out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(dataset, count, data.seed).savefig(out)
    print(f"wrote {out}")


def ablate_command(
    output: Path = Path("runs/ablation"),
    configurations: str = ",".join(CONFIGURATIONS),
    seeds: tuple[int, ...] = (0, 1, 2),
    data: Data = SCENES_TO_TRAIN,
    validation: Data = SCENES_TO_SCORE,
    train: TrainConfig = EMBEDDED_TRAINING,
) -> None:
    """Trains several configurations with several seeds for equal steps, and prints a table: mean ± sd.

    Args:
        output: the folder; finished runs found there are not run again.
        configurations: names, comma-separated.
        seeds: training seeds.
        data: what to train on.
        validation: what to score on; its classes and unseen classes count.
        train: the training's options; its seed is replaced.
    """
    unknown = [name for name in names(configurations) if name not in CONFIGURATIONS]
    if unknown:
        raise ValueError(f"there is no configuration {', '.join(unknown)}; there are {', '.join(CONFIGURATIONS)}")
    chosen = {name: CONFIGURATIONS[name] for name in names(configurations)}
    dataset, _ = data.load("training")
    scored, split = validation.load("evaluation")
    print(ablate(chosen, dataset, scored, split, train, seeds, output))


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
    print(f"wrote {output}; use it with --clip tiny --clip-weights {output}")


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
    print(imported.report())
    print(f"wrote {save_model(imported.model, output, {'imported_from': checkpoint.name})}")


COMMANDS = {
    "demo": demo,
    "data check": check_command,
    "data show": show_command,
    "evaluate": evaluate_command,
    "ablate": ablate_command,
    "segment": segment_command,
    "pretrain": pretrain_command,
    "import": import_command,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Bad input ends with one sentence on standard error and exit code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    given[:2] = [" ".join(given[:2])] if given[:1] == ["data"] else given[:2]  # "data check" is one name to tyro
    try:
        if given[:1] == ["train"]:
            train_command(given[1:])
        else:
            commands = {**COMMANDS, "train": Train}
            tyro.extras.subcommand_cli_from_dict(commands, args=given, prog="sptseg", description=__doc__)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"sptseg: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
