"""The command line of sptseg. Options come from the dataclasses; every command explains itself with --help."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from sptseg.checkpoints import import_research, load_model, save_model
from sptseg.cli import benchmark
from sptseg.cli.demo import demo
from sptseg.cli.options import Which, clip_weights, deferred, one_line
from sptseg.datasets import (
    SCENES_TO_SCORE,
    SCENES_TO_TRAIN,
    Data,
    check_dataset,
    contact_sheet,
    names,
    plots,
    sorted_images,
)
from sptseg.inference import by_training, evaluate, read_ahead, segment
from sptseg.interactive import explore, notebooks
from sptseg.model import EMBEDDED_CONFIG, TINY, ModelConfig, build_model, load_clip
from sptseg.system import is_main_process, one_voice, output_place, processes, write
from sptseg.training import (
    CONFIGURATIONS,
    EMBEDDED_TRAINING,
    LADDER,
    PRESETS,
    PresetName,
    PretrainConfig,
    Setting,
    TrainConfig,
    ablate,
    fit,
    in_setting,
    preflight,
    pretrain,
)


def evaluate_command(
    data: Annotated[Data, tyro.conf.arg(name="")],
    which: Annotated[Which, tyro.conf.arg(name="")],
    seen_offset: float | None = None,
    limit: int | None = None,
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
        workers: processes that read ahead.
        json_file: write the scores there, each class's IoU too.
    """
    if json_file is not None:
        output_place(json_file)
    dataset, split = data.load("evaluation")
    model = which.load()
    shown, new = model.about.get("seen", ()), model.about.get("unseen", ())
    across = bool(shown) and {*shown, *new} != set(split.classes)
    seen_offset = 0.0 if across and seen_offset is None else seen_offset
    scores = evaluate(model, dataset, split, seen_offset=seen_offset, limit=limit, workers=workers)
    report = scores.as_dict()
    print(scores.table())
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
    if json_file is not None and is_main_process():
        write(json_file, json.dumps(report, indent=1) + "\n")


@dataclass(frozen=True)
class Train:
    """Train on a data set; writes the trained parts, the history and the settings to a folder.

    SIGTERM or Ctrl-C lets the iteration end and saves; the same command with --resume goes on.

    Attributes:
        output: the folder.
        preset: what all other options start from. On scenes: "embedded" (SPT-SEG as it transfers best to the tiny
            CLIP), "spt" (as released) or "zegclip". The literature's protocol on real data: "voc", "coco-stuff" and
            "context", and the same with ZegCLIP's decoder and loss.
        start_from: a checkpoint to continue from; its configuration counts. Transductive training needs one, such as
            the half-way checkpoint that inductive training leaves: runs/voc/halfway.safetensors.
        resume: go on from the state in `output`.
        preflight_only: check data, classes, targets and one step, write the first batch as a picture, and stop.
        data: the pictures; validation looks at the layout's validation subset, or in a plain folder at the same ones.
        model: the model's options.
        train: the training's options. The setting decides defaults too: transductive training has half the
            iterations, and other settings than the inductive one do not lower the scores of seen classes.
    """

    output: Path
    preset: PresetName = "embedded"
    start_from: str = ""
    resume: bool = False
    preflight_only: bool = False
    data: Annotated[Data, tyro.conf.arg(name="")] = SCENES_TO_TRAIN
    model: Annotated[ModelConfig, tyro.conf.arg(name="")] = EMBEDDED_CONFIG
    train: TrainConfig = EMBEDDED_TRAINING

    def run(self) -> None:
        output_place(self.output, folder=True)
        dataset, split = self.data.load("training")
        validation = replace(self.data, subset="").load("evaluation")[0] if self.train.validate_every else None
        torch.manual_seed(self.train.seed)
        if self.start_from:
            own = load_clip(self.model.clip, self.model.clip_weights) if self.clip_file else None
            model = load_model(self.start_from, own)
            if self.train.setting != "inductive":
                model.config = replace(model.config, seen_offset=self.model.seen_offset)
        elif self.train.setting == "transductive" and self.model.start == "random":
            raise ValueError(
                "transductive training learns from the model's own labels: give --start-from an inductive checkpoint, "
                "such as runs/voc/halfway.safetensors"
            )
        else:
            weights = clip_weights(self.model.clip, self.model.clip_weights or "")
            model = build_model(replace(self.model, clip_weights=weights))
        report = preflight(model, dataset, split, self.train, folder=self.output)
        print(report.text())
        report.raise_on_fault()
        if self.preflight_only:
            return
        data = asdict(self.data.resolved("training"))
        about = {"preset": self.preset, "data_options": data, "start_from": self.start_from}
        fit(
            model, dataset, split, self.train,
            output=self.output, validation=validation, resume=self.resume, about=about,
        )  # fmt: skip
        where = f" --data {self.data.data} --layout {self.data.layout}" if self.data.data != "scenes" else ""
        own = f" --clip {self.model.clip} --clip-weights {self.model.clip_weights}" if self.clip_file else ""
        print(f"the trained model is in {self.output}; score it: sptseg evaluate --model {self.output}{where}{own}")

    @property
    def clip_file(self) -> bool:
        """Whether CLIP's weights are a file, which the command names, as no path in a checkpoint is opened."""
        return Path(self.model.clip_weights or "").is_file()


@dataclass(frozen=True)
class Ablate:
    """Trains several configurations with several seeds for equal steps, and prints a table: mean ± sd.

    Attributes:
        output: the folder; finished runs found there are not run again, stopped ones go on.
        preset: what all other options start from, and the configurations' CLIP; as for `sptseg train`.
        configurations: names, comma-separated; default: all on scenes, on real data the paper's ladder of parts. With
            @supervised or @transductive behind it, a configuration is trained in that setting, transductively from the
            half-way checkpoint of its inductive run.
        seeds: training seeds.
        data: what to train on.
        validation: what to score on; its classes and unseen classes count.
        train: the training's options; its seed is replaced.
    """

    output: Path = Path("runs/ablation")
    preset: PresetName = "embedded"
    configurations: str = ""
    seeds: tuple[int, ...] = (0, 1, 2)
    data: Data = SCENES_TO_TRAIN
    validation: Data = SCENES_TO_SCORE
    train: TrainConfig = EMBEDDED_TRAINING

    def run(self) -> None:
        output_place(self.output, folder=True)
        preset = PRESETS[self.preset]
        default = CONFIGURATIONS if preset.data == SCENES_TO_TRAIN else LADDER
        chosen = names(self.configurations) or list(default)
        unknown = [name for name in chosen if name.partition("@")[0] not in CONFIGURATIONS]
        if unknown:
            raise ValueError(f"there is no configuration {', '.join(unknown)}; there are {', '.join(CONFIGURATIONS)}")
        configurations = {name: preset.with_method(CONFIGURATIONS[name.partition("@")[0]]).model for name in chosen}
        dataset, _ = self.data.load("training")
        scored, split = self.validation.load("evaluation")
        print(ablate(configurations, dataset, scored, split, self.train, self.seeds, self.output))


@dataclass(frozen=True)
class Chosen:
    """Only the options that decide the defaults of the others."""

    preset: PresetName = "embedded"
    setting: Annotated[Setting, tyro.conf.arg(name="train.setting")] = "inductive"


def with_preset(command: str, arguments: Sequence[str]) -> Train | Ablate:
    """`train` or `ablate` as asked for, with the preset's values as defaults."""
    chosen = tyro.cli(Chosen, args=list(arguments), return_unknown_args=True, add_help=False)[0]
    preset = PRESETS[chosen.preset]
    prog = f"sptseg {command}"
    if command == "ablate":
        scored = SCENES_TO_SCORE if preset.data == SCENES_TO_TRAIN else preset.data
        ablation = Ablate(preset=chosen.preset, data=preset.data, validation=scored, train=preset.train)
        return tyro.cli(Ablate, args=list(arguments), default=ablation, prog=prog)
    model, train = in_setting(preset.model, preset.train, chosen.setting)
    default = Train(output=tyro.MISSING, preset=chosen.preset, data=preset.data, model=model, train=train)
    return tyro.cli(Train, args=list(arguments), default=default, prog=prog)


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
    if out.suffix:
        plots.picture_place(out)
    else:
        output_place(out, folder=True)
    model = which.load().to("cuda" if torch.cuda.is_available() else "cpu")
    if len(files) == 1 and out.suffix:
        result = segment(model, files[0], names(classes), full_resolution=full_resolution)
        result.save(out)
        print("\n".join(f"{share:7.1%}  {name}" for name, share in result.areas().items()))
        print(f"wrote {out}")
        return
    if out.suffix:
        raise ValueError(
            f"{len(files)} pictures do not fit into one file {out}: give a folder, such as --out {out.with_suffix('')}"
        )
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["picture", *names(classes)])
    for file, picture in zip(files, read_ahead(files), strict=True):
        result = segment(model, picture.result(), names(classes), full_resolution=full_resolution)
        result.save(out / f"{file.stem}.png")
        result.save_labels(out / f"{file.stem}-labels.png")
        writer.writerow([file.name, *(f"{share:.4f}" for share in result.areas().values())])
        print(f"wrote {out / file.stem}.png")
    write(out / "areas.csv", table.getvalue())


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
    if json_file is not None:
        output_place(json_file)
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
    plots.picture_place(out)
    dataset, _ = replace(data, data=root).load("evaluation")
    plots.save_figure(contact_sheet(dataset, count, data.seed), out)
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
        device: what computes: cpu or cuda.
    """
    config = replace(PretrainConfig(seed) if dense_losses else PretrainConfig.plain(seed), device=device)
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
    output_place(output, folder=output.suffix != ".safetensors")
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
    "notebooks run": notebooks.run,
    "notebooks check": notebooks.check,
}


IN_SEVERAL_PROCESSES = ("train", "ablate", "evaluate")  # what torchrun and accelerate launch may start


@one_voice()
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Bad input ends with one sentence on standard error and exit code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] in (["data"], ["notebooks"]):
        given[:2] = [" ".join(given[:2])]  # "data check" is one name to tyro
    try:
        with one_line():
            if given[:1] in (["train"], ["ablate"]):
                run = with_preset(given[0], given[1:]).run
            else:
                commands = {name: deferred(command) for name, command in COMMANDS.items()}
                commands |= {"train": Train, "ablate": Ablate}
                run = tyro.extras.subcommand_cli_from_dict(commands, args=given, prog="sptseg", description=__doc__)
        if processes() > 1 and given[0] not in IN_SEVERAL_PROCESSES:
            raise ValueError(f"sptseg {given[0]} works in one process; start it without torchrun or accelerate launch")
        run()
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        said = str(error) or "memory ran out"
        print(f"sptseg: {' '.join(said.split())[:2000]}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
