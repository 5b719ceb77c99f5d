"""Training on Hugging Face accelerate: one process, many GPUs, many machines, the same code."""

import json
import math
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from sptseg.checkpoints import save_model
from sptseg.datasets import Augmentation, Sample, Split, read_batches
from sptseg.inference import evaluate, new_accelerator
from sptseg.model import SptSeg, fingerprint, upsample
from sptseg.system import ended_helpers, output_place, write
from sptseg.training import state
from sptseg.training.config import TrainConfig, learning_rate, training_augmentation
from sptseg.training.losses import present_pairs, segmentation_loss
from sptseg.training.stream import UNSEEN_PIXEL, Positions, TrainingStream, collate, label_table, mixed_seed


class FitResult(NamedTuple):
    """The trained model and one row per logged iteration: loss terms, learning rate, images/s, validation figures."""

    model: SptSeg
    history: list[dict[str, Any]]


def fit(
    model: SptSeg,
    dataset: Dataset[Sample],
    split: Split,
    config: TrainConfig | None = None,
    *,
    output: str | Path | None = None,
    validation: Dataset[Sample] | None = None,
    augment: Augmentation | None = None,
    resume: bool = False,
    about: Mapping[str, Any] | None = None,
) -> FitResult:
    """Trains the model's own parts (never CLIP) in place.

    With an output folder, SIGTERM and SIGINT let the iteration end and save the state, in all processes of a run; then
    SIGTERM exits with code 143 (SystemExit), SIGINT raises KeyboardInterrupt, a second SIGINT at once.

    Args:
        dataset: items {"image" uint8 (3, H, W), "label" (H, W), "name"} without a transform.
        split: the classes of the labels, and which are unseen.
        output: a folder for `model.safetensors`, `history.json`, `config.json` and the state that `resume` reads; in
            the inductive setting also for `halfway.safetensors`, from which transductive training goes on.
        validation: looked at every `config.validate_every` iterations.
        augment: by default `training_augmentation`.
        resume: go on from the state in `output`, if there is one; with the same bits on a GPU only in PyTorch's
            deterministic mode: torch.use_deterministic_algorithms(True), CUBLAS_WORKSPACE_CONFIG=:4096:8 set.
        about: JSON values to keep in `config.json` and in the checkpoints, such as the preset's name."""
    config = config or TrainConfig()
    if output is None and (resume or config.tensorboard):
        raise ValueError("resume and tensorboard need an output folder; give output=")
    if config.validate_every and validation is None:
        raise ValueError("validate_every is set but there is no validation data; give validation=, or set it to 0")
    run = Trainer(model, dataset, split, config, output, augment, resume, about)
    last = config.iterations
    noting = nullcontext([]) if run.folder is None else state.noted_signals()
    with ended_helpers("use workers=0 (command line: --train.workers 0)"), noting as noted:
        for done in range(run.done + 1, last + 1):
            terms = run.step(done - 1)
            validating = due(config.validate_every, done, last)
            if validating or due(max(1, last // 200), done, last):
                run.log(done, terms, validation if validating else None)
            stopped = 0 if done == last else run.agreed_signal(noted)
            if stopped or due(config.save_every, done, last):
                run.save(done)
            if config.setting == "inductive" and done == last // 2:
                run.save_model(state.HALFWAY, {"iteration": done})
            if stopped:
                run.stop(stopped)
    run.save_model("", {})
    run.write("history.json", run.history)
    run.close()
    return FitResult(model, run.history)


def due(every: int, done: int, last: int) -> bool:
    """Whether something that happens every so many iterations (0: never), and after the last, happens now."""
    return every > 0 and (done % every == 0 or done == last)


class Trainer:
    """A run of `fit` on its way: what it trains and reads, where it writes, how far it is. Arguments are `fit`'s."""

    def __init__(
        self, model: SptSeg, dataset: Dataset[Sample], split: Split, config: TrainConfig,
        output: str | Path | None = None, augment: Augmentation | None = None, resume: bool = False,
        about: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        if config.setting != "supervised" and not split.unseen:
            how = "use setting='supervised', or name some with with_unseen"
            in_commands = "(commands: --train.setting supervised, or --unseen)"
            raise ValueError(f"split {split.name!r} has no unseen classes; {how} {in_commands}")
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("this model has nothing to train, as dense CLIP; give it prompts or a decoder")
        self.model, self.split, self.config = model, split, config
        self.done, self.history = 0, []  # iterations, and a row for some of them
        self.folder = None if output is None else output_place(output, folder=True)
        tracker = "tensorboard" if config.tensorboard else None
        self.accelerator = new_accelerator(config.precision, log_with=tracker, project_dir=self.folder)
        if tracker:
            self.accelerator.init_trackers(tracker, config=None)
        self.main, self.rank = self.accelerator.is_main_process, self.accelerator.process_index
        torch.manual_seed(config.seed)
        queries, table = label_table(split, config.setting)
        groups = parameter_groups(model, config.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
        model.encoder.checkpointing = config.checkpointing
        trainee = Trainee(model, model.class_embeddings(split.texts(queries)))
        self.trainee, self.optimizer = self.accelerator.prepare(trainee, optimizer)

        self.settings = {
            "train": asdict(config), "model": asdict(model.config), "split": asdict(split),
            "data": state.identity(dataset), "clip": {"fingerprint": fingerprint(model.clip)},
        }  # fmt: skip
        about = dict(about or {})
        seen = split.classes if config.setting == "supervised" else split.names(split.seen)
        classes = {"split": split.name, "seen": [*seen], "unseen": [*split.names(split.unseen)]}
        self.facts = {**classes, "train": self.settings["train"], **about}
        if self.folder is not None and resume:
            self.load(self.folder / state.STATE)
        self.write("config.json", {**self.settings, "about": about})

        stream = TrainingStream(dataset, augment or training_augmentation(model, config), table, config.seed)
        share = config.batch_size, config.accumulation, self.rank, self.accelerator.num_processes
        positions, cuda = Positions(range(self.done, config.iterations), *share), self.accelerator.device.type == "cuda"
        self.batches = read_batches(stream, positions, collate, config.workers, pin_memory=cuda)
        hidden = not (self.main and config.progress)
        self.bar = tqdm(total=config.iterations, initial=self.done, desc="training", disable=hidden, mininterval=1)
        self.logged, self.time = self.done, time.perf_counter()
        self.trainee.train()

    def load(self, path: Path) -> None:
        """Goes on from a state, if there is one. Raises ValueError if it is damaged, or if other settings made it."""
        if not path.is_file():
            return
        kept = state.read_tensors(path, self.model.device)
        before = json.loads(kept["settings"])
        clip = {"fingerprint": fingerprint(self.model.clip, like=before["clip"]["fingerprint"])}
        free = {f"train.{name}" for name in state.MAY_CHANGE_ON_RESUME}
        if changed := [name for name in state.differing(before, {**self.settings, "clip": clip}) if name not in free]:
            other = f"{path} was trained with other settings of {', '.join(changed)}"
            raise ValueError(f"{other}; resume with the same, or choose another output")
        self.model.load_state_dict(kept["model"], strict=False)
        self.optimizer.load_state_dict(kept["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(kept["scaler"])
        self.done, self.history = kept["iteration"], json.loads(kept["history"])

    def save(self, done: int) -> None:
        """Writes the state from which `resume` goes on; not if a weight is no number (FloatingPointError): the last
        state stays a good one."""
        self.done, weights, scaler = done, self.model.trained_state(), self.accelerator.scaler
        if self.folder is None or not self.main:
            return
        if broken := [name for name, value in weights.items() if not value.isfinite().all()]:
            raise FloatingPointError(f"weights are no numbers after iteration {done}: {', '.join(broken[:3])}")
        content = {"iteration": done, "settings": json.dumps(self.settings), "history": json.dumps(self.history)}
        content |= {"model": weights, "optimizer": self.optimizer.state_dict()}
        state.write_tensors(self.folder / state.STATE, {**content, "scaler": scaler and scaler.state_dict()})

    def step(self, iteration: int) -> dict[str, float]:
        """The loss terms of one iteration; raises FloatingPointError, with the pictures' names, if they are none."""
        torch.manual_seed(mixed_seed(self.config.seed, iteration, self.rank))  # dropout, whatever came before
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, iteration)
        batches = [next(self.batches) for _ in range(self.config.accumulation)]
        parts = [(batch.image, batch.target) for batch in batches]
        terms = step(self.accelerator, self.trainee, self.optimizer, parts, self.split, self.config)
        if not math.isfinite(terms["total"]):
            names = ", ".join(gather_object([name for batch in batches for name in batch.name]))
            advice = "lower learning_rate, or use precision='no'"
            raise FloatingPointError(f"the loss is {terms['total']} at iteration {iteration}, on {names}; {advice}")
        self.bar.update()
        return terms

    def log(self, done: int, terms: dict[str, float], validation: Dataset[Sample] | None) -> None:
        """A row of the history, with scores on the validation data, if there are any."""
        speed = self.config.batch_size * (done - self.logged) / (time.perf_counter() - self.time)
        rate = self.optimizer.param_groups[0]["lr"]
        row = {"iteration": done, **terms, "learning_rate": rate, "images_per_second": speed}
        if validation is not None:
            options = {"limit": self.config.validation_images, "accelerator": self.accelerator, "progress": False}
            row |= evaluate(self.model, validation, self.split, **options).summary()
            self.trainee.train()
        self.history.append(row)
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in terms.items()})
        self.accelerator.log({name: value for name, value in row.items() if value is not None}, step=done)
        self.logged, self.time = done, time.perf_counter()

    def write(self, name: str, values: Any) -> None:
        if self.folder is not None and self.main:
            write(self.folder / name, json.dumps(values, indent=1) + "\n")

    def save_model(self, name: str, further: Mapping[str, Any]) -> None:
        if self.folder is not None and self.main:
            save_model(self.model, self.folder / name, {**self.facts, **further})

    def close(self) -> None:
        self.bar.close()
        self.model.eval()
        del self.batches  # ends the loading processes
        for tracker in self.accelerator.trackers:
            tracker.finish()  # accelerator.end_training() would also end the process group, which evaluate counts with
        self.accelerator.wait_for_everyone()  # until all is written

    def agreed_signal(self, noted: Sequence[int]) -> int:
        """The highest signal that any process noted, in all processes alike; 0 for none."""
        every: Any = self.accelerator.gather(torch.tensor([max(noted, default=0)], device=self.accelerator.device))
        return int(every.max())

    def stop(self, number: int) -> NoReturn:
        """Ends the program as the signal asks for, once all processes are here."""
        self.close()
        if self.main:
            done = f"iteration {self.done} of {self.config.iterations}; the state is in {self.folder}"
            how = "go on with resume=True (command line: the same command and --resume)"
            print(f"stopped by {signal.Signals(number).name} after {done}: {how}", file=sys.stderr)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters in two groups: layer norms without weight decay, all others with it; chosen by module."""
    layers = [module for module in model.modules() if isinstance(module, nn.LayerNorm | nn.RMSNorm)]
    norms = [p for layer in layers for p in layer.parameters(recurse=False) if p.requires_grad]
    known = {id(p) for p in norms}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    return [{"params": others, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}]


def pseudo_labels(
    logits: Tensor, labels: Tensor, seen: Sequence[int] | Tensor, unseen: Sequence[int] | Tensor
) -> Tensor:
    """Labels (B, S, S') whose unseen pixels (-1) hold the best unseen class by logits (B, C, h, w) of all classes; the
    self-training step. `seen` and `unseen` are the positions of the classes in C."""
    unseen, classes = torch.as_tensor(unseen, device=logits.device), logits.shape[1]
    if sorted([*torch.as_tensor(seen).tolist(), *unseen.tolist()]) != list(range(classes)):
        positions = f"{len(seen)} seen and {len(unseen)} unseen positions"
        raise ValueError(f"{positions} do not make up the {classes} classes of the logits; wanted each position once")
    scores = upsample(logits.detach()[:, unseen], (labels.shape[-2], labels.shape[-1]))
    best = unseen[scores.argmax(dim=1)]
    return torch.where(labels == UNSEEN_PIXEL, best.to(labels.dtype), labels)


class Trainee(nn.Module):
    """The model with its text embeddings: pictures in, mask logits out, as wrapping for many processes wants it."""

    def __init__(self, model: SptSeg, text: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("text", text, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images, self.text)


def step(
    accelerator: Accelerator,
    trainee: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[tuple[Tensor, Tensor]],
    split: Split,
    config: TrainConfig,
) -> dict[str, float]:
    """One optimiser step over micro-batches; returns the loss terms of the whole batch, over all processes."""
    device, transductive = accelerator.device, config.setting == "transductive"
    moved = [(x.to(device, non_blocking=True), y.to(device, non_blocking=True)) for x, y in batches]
    model: SptSeg = accelerator.unwrap_model(trainee).model
    classes = len(split.classes) if config.setting != "inductive" else len(split.seen)
    pairs = None if transductive else mean_pairs(accelerator, [y for _, y in moved], classes)
    sums: dict[str, Tensor] = {}
    optimizer.zero_grad(set_to_none=True)
    for i, (images, labels) in enumerate(moved):
        with nullcontext() if i == len(moved) - 1 else accelerator.no_sync(trainee):
            with accelerator.autocast():
                logits = trainee(images)
            if transductive:
                labels = pseudo_labels(logits, labels, split.seen, split.unseen)
                pairs = mean_pairs(accelerator, [labels], classes)
            losses = segmentation_loss(logits, labels, model.config.loss, pairs=pairs)
            accelerator.backward(losses["total"] / len(moved))
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value.detach() / len(moved)
    optimizer.step()
    means: Any = accelerator.reduce(sums, reduction="mean")
    return {name: value.item() for name, value in means.items()}


def mean_pairs(accelerator: Accelerator, labels: Sequence[Tensor], classes: int) -> Tensor:
    """The loss's divisor per process and micro-batch: an even share of the whole batch's pairs, at least 1 in all."""
    pairs = torch.stack([present_pairs(y, classes).sum() for y in labels]).sum().float()
    total: Any = accelerator.reduce(pairs, reduction="sum")
    return total.clamp(min=1) / (accelerator.num_processes * len(labels))
