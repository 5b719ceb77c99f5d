"""Training on the command line, one model or many: options that start from a preset."""

import math
import os
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from accelerate import PartialState

from sptseg import training
from sptseg.analysis import spectral_summary
from sptseg.checkpoints import load_model
from sptseg.datasets import SCENES_TO_SCORE, SCENES_TO_TRAIN, Data, names
from sptseg.model import EMBEDDED_CLIPS, EMBEDDED_CONFIG, ModelConfig, build_model, load_clip
from sptseg.system import output_place
from sptseg.training import CONFIGURATIONS, EMBEDDED_TRAINING, PRESETS, PresetName, Setting, TrainConfig


@dataclass(frozen=True)
class Train:
    """Train on a data set; writes the trained parts, the history and the settings to a folder.

    SIGTERM or Ctrl-C lets the iteration end and saves; the same command with --resume goes on.

    Attributes:
        output: the folder.
        preset: what all other options start from. On scenes: "embedded" (SPT-SEG as it transfers best to the tiny
            CLIP), "spt" (as released) or "zegclip". The literature's protocol on real data: "voc", "coco-stuff" and
            "context", and the same with ZegCLIP's decoder and loss. "naclip", "voc-naclip", "coco-stuff-naclip": our
            variant on top of NACLIP's read-out, the best on the plain tiny CLIP in short runs, unproven on photographs.
        start_from: a checkpoint to continue from; its configuration counts. Transductive training needs one, such as
            the half-way checkpoint that inductive training leaves: runs/voc/halfway.safetensors.
        resume: go on from the state in `output`.
        preflight_only: check data, classes, targets and one step, write the first batch as a picture, and stop.
        data: the pictures; validation looks at the layout's validation subset, or in a plain folder at the same ones.
        model: the model's options.
        train: the training's options. The setting decides defaults too: transductive training has half the
            iterations, and other settings than the inductive one do not lower the scores of seen classes."""

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
            asked, unasked, its = map(asdict, (self.model, PRESETS[self.preset].model, model.config))
            if given := [n for n in asked if asked[n] not in (unasked[n], its[n]) and n != "clip_weights"]:
                raise ValueError(f"{self.start_from} has its own {', '.join(given)}; leave these options out")
        elif self.train.setting == "transductive" and self.model.start == "random":
            wanted = "give --start-from an inductive checkpoint, such as runs/voc/halfway.safetensors"
            raise ValueError(f"transductive training learns from the model's own labels: {wanted}")
        else:
            weights = clip_weights(self.model.clip, self.model.clip_weights or "")
            model = build_model(replace(self.model, clip_weights=weights))
        model.to(PartialState().device)  # on a GPU the thousands of prompts of many classes take seconds, not a minute
        report = training.preflight(model, dataset, split, self.train, folder=self.output)
        print(report.text())
        report.raise_on_fault()
        if self.preflight_only:
            return
        state = self.output / training.STATE
        if self.resume and not state.is_file():
            print(f"{state} is not there: starting anew")
        elif state.is_file() and not self.resume:
            print(f"{state} is overwritten; --resume goes on")
        data = asdict(self.data.resolved("training"))
        about = {"preset": self.preset, "data_options": data, "start_from": self.start_from}
        training.fit(
            model, dataset, split, self.train,
            output=self.output, validation=validation, resume=self.resume, about=about,
        )  # fmt: skip
        print(f"the trained model is in {self.output}; score it: {shlex.join(self.scoring())}")

    def scoring(self) -> Iterator[str]:
        """The words of the command that scores the trained model on pictures like those of the training."""
        yield from ("sptseg", "evaluate", "--model", str(self.output))
        for field in fields(Data):
            value = getattr(self.data, field.name)
            if value != field.default and field.name not in ("subset", "images", "seed"):
                yield from (f"--{field.name.replace('_', '-')}", *([] if value is True else [str(value)]))
        if self.clip_file:
            yield from ("--clip", self.model.clip, "--clip-weights", str(self.model.clip_weights))

    @property
    def clip_file(self) -> bool:
        """Whether CLIP's weights are a file, which the command names, as no path in a checkpoint is opened."""
        return Path(self.model.clip_weights or "").expanduser().is_file()


@dataclass(frozen=True)
class Ablate:
    """Trains several configurations with several seeds for equal steps, and prints a table: mean ± sd.

    With a plan it runs that study instead: processes that share the output folder share its runs, what is finished is
    not run again, and once all is done (or with --minutes 0, of what is done) the tables are written.

    Attributes:
        output: the folder; finished runs found there are not run again, stopped ones go on.
        preset: what all other options start from, and the configurations' CLIP; as for `sptseg train`.
        clip: "tiny" or "tiny-plain" instead of the preset's CLIP.
        configurations: names, comma-separated; default: all on scenes, on real data the paper's ladder of parts. With
            @supervised or @transductive behind it, a configuration is trained in that setting, transductively from the
            half-way checkpoint of its inductive run.
        seeds: training seeds.
        data: what to train on.
        validation: what to score on; its classes and unseen classes count.
        train: the training's options; its seed is replaced.
        plan: a study's file, such as data/study.json; of the other options only those below count then.
        share: of a plan, I/N takes every N-th row from the I-th on: for machines that share no folder.
        minutes: of a plan, after so many the state is saved and the command ends; 0 only writes the tables.
        device: of a plan, what computes it: "auto" is a GPU where there is one."""

    output: Path = Path("runs/ablation")
    preset: PresetName = "embedded"
    clip: str = ""
    configurations: str = ""
    seeds: tuple[int, ...] = (0, 1, 2)
    data: Data = SCENES_TO_TRAIN
    validation: Data = SCENES_TO_SCORE
    train: TrainConfig = EMBEDDED_TRAINING
    plan: Path | None = None
    share: str = "1/1"
    minutes: float | None = None
    device: Literal["auto", "cpu"] = "auto"

    def run(self) -> None:
        output_place(self.output, folder=True)
        if self.plan is not None:
            return self.study(self.plan)
        preset = PRESETS[self.preset]
        default = CONFIGURATIONS if preset.data == SCENES_TO_TRAIN else training.LADDER
        chosen = {name: name.partition("@")[0] for name in names(self.configurations) or default}
        if unknown := set(chosen.values()) - set(CONFIGURATIONS):
            raise ValueError(f"there is no configuration {', '.join(unknown)}; there are {', '.join(CONFIGURATIONS)}")
        if self.clip and self.clip not in EMBEDDED_CLIPS:
            raise ValueError(f"--clip is {self.clip}; wanted {' or '.join(EMBEDDED_CLIPS)}, or a --preset with another")
        if self.clip:
            preset = replace(preset, model=replace(preset.model, clip=self.clip, clip_weights=None))
        configurations = {name: preset.with_method(CONFIGURATIONS[own]).model for name, own in chosen.items()}
        dataset, _ = self.data.load("training")
        scored, split = self.validation.load("evaluation")
        print(training.ablate(configurations, dataset, scored, split, self.train, self.seeds, self.output))

    def study(self, plan: Path) -> None:
        until = time.monotonic() + 60 * (math.inf if self.minutes is None else self.minutes)
        if self.device == "cpu":
            os.environ["ACCELERATE_USE_CPU"] = "true"
        elif torch.cuda.is_available():  # the same bits each time, see `fit`
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
        share = re.fullmatch(r"(\d+)/(\d+)", self.share)
        i, n = map(int, share.groups()) if share else (0, 0)
        if not 1 <= i <= n:
            raise ValueError(f"--share is {self.share!r}; wanted I/N with I from 1 to N, such as 1/2")
        study = training.Study(training.Plan.read(plan), self.output, spectral_summary)
        if self.minutes == 0 or study.work((i, n), until, lambda text: print(text, flush=True)):
            print(training.write_report(study))


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
    model, train = training.in_setting(preset.model, preset.train, chosen.setting)
    default = Train(output=tyro.MISSING, preset=chosen.preset, data=preset.data, model=model, train=train)
    return tyro.cli(Train, args=list(arguments), default=default, prog=prog)


def clip_weights(clip: str, weights: str) -> str | None:
    """The weights asked for; a real CLIP must name them, so that nobody trains on random ones unawares."""
    if clip not in EMBEDDED_CLIPS and not weights:
        wanted = "an open_clip tag such as openai, a file, or none for random weights"
        raise ValueError(f"--clip {clip} needs --clip-weights: {wanted}")
    return None if weights in ("", "none") else weights
