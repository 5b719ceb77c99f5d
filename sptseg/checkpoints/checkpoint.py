"""Checkpoints: trained parts in safetensors with the configuration as JSON beside them, held to a checksum.

They may come from strangers: a file is tensors and JSON, nothing in it is executed, no path named in it is opened, and
its configuration must fit its tensors before anything of that size is made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from sptseg.checkpoints.research import (
    IMPORTED,
    check_architecture,
    clip_architecture,
    clip_from_architecture,
    import_research_checkpoint,
)
from sptseg.model import (
    DENSE_CLIP,
    Clip,
    ModelConfig,
    SptSeg,
    build_model,
    check_public,
    data_file,
    default_readout,
    fingerprint,
    load_clip,
)
from sptseg.system import write

__all__ = ["IMPORTED", "import_research_checkpoint", "load_model", "save_model"]
FORMAT = "sptseg-1"
EMBEDDED = {"embedded": "spt_seg.safetensors", "embedded-zegclip": "zegclip.safetensors"}
WEIGHTS_FILE = "model.safetensors"
LATER_FIELDS = {
    "readout",
    "spectral_band",
    "spectral_trained",
    "branches",
    "residual",
    "norms",
    "logit_scale",
}  # none in old files


def config_from_dict(values: Mapping[str, Any]) -> ModelConfig:
    """A validated `ModelConfig` from JSON values; unknown or missing fields are refused by name.

    Fields that came later than the file have the defaults, which do what the file's version did."""
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    unknown, missing = sorted(set(values) - known), sorted(known - set(values) - LATER_FIELDS)
    if unknown:
        raise ValueError(f"unknown ModelConfig fields: {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    if missing:
        raise ValueError(f"missing ModelConfig fields: {', '.join(missing)}")
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return ModelConfig(**{**values, **lists})


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's JSON values with those that are younger than its file."""
    return json.loads(json.dumps(dataclasses.asdict(config_from_dict(values))))


def save_model(model: SptSeg, path: str | Path, about: Mapping[str, Any] | None = None, *, half: bool = False) -> Path:
    """Writes the trained parts and the configuration to one safetensors file (in a folder: `model.safetensors`).

    `about` (JSON values: data, seed, figures) is kept with the configuration; `half` stores float16, which loads as
    float32. The file is written whole or not at all.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path / WEIGHTS_FILE
    header: dict[str, Any] = {
        "format": FORMAT,
        "config": dataclasses.asdict(model.config),
        "clip": fingerprint(model.clip),
        "about": dict(about or {}),
    }
    state = model.trained_state()
    if model.config.clip == IMPORTED:
        state |= {f"clip.{name}": value for name, value in model.clip.model.state_dict().items()}
        header["architecture"] = clip_architecture(model.clip)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    if half:
        tensors = {name: value.half() for name, value in tensors.items()}
    header["sha256"] = checksum(tensors)
    return write(path, save(tensors, metadata={"sptseg": json.dumps(header)}))


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_model(source: str | Path = "embedded", clip: Clip | None = None) -> SptSeg:
    """A model in evaluation mode.

    Args:
        source: "embedded" (SPT-SEG on the tiny CLIP), "embedded-zegclip", "dense-clip" (no training, the tiny CLIP's
            patch embeddings; of another `clip` by `default_readout`), a checkpoint file or a folder that holds one.
        clip: the CLIP model to use, if it is already loaded, or if its weights are a file of yours: a path that stands
            in a checkpoint is not opened.
    """
    if source == "dense-clip":
        clip = load_clip() if clip is None else clip
        return build_model(dataclasses.replace(DENSE_CLIP, readout=default_readout(clip.name)), clip).eval()
    if source in EMBEDDED:
        return load_model(data_file(EMBEDDED[str(source)]), clip)
    path = Path(source)
    path = path / WEIGHTS_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no checkpoint {path}; wanted {', '.join(EMBEDDED)}, dense-clip, or a file or folder "
            f"written by sptseg train"
        )
    header, state = read_header(path), load_file(path)
    digest = checksum(state)
    with refusals_naming(path):
        config = config_from_dict(header["config"])
        if config.clip == IMPORTED:
            tower = {k.removeprefix("clip."): v for k, v in state.items() if k.startswith("clip.")}
            check_architecture(header["architecture"], len(tower))
            with torch.device("meta"):  # sizes without memory: they may be anything
                planned = clip_from_architecture(header["architecture"]).model.state_dict()
            check_fit(planned, tower, path)
            clip = clip_from_architecture(header["architecture"])
            clip.model.load_state_dict(tower)
            state = {k: v for k, v in state.items() if not k.startswith("clip.")}
    if clip is None:
        check_public(config.clip, config.clip_weights, path)
        clip = load_clip(config.clip, config.clip_weights)
    with refusals_naming(path):
        with torch.device("meta"):
            planned = build_model(config, clip).trained_state()
        check_fit(planned, state, path)
        model = build_model(config, clip)
    model.load_state_dict(state, strict=False)
    model.about = header.get("about", {})
    if header.get("sha256", digest) != digest:  # files of before had none
        raise ValueError(
            f"{path} is damaged: its tensors have not the checksum that it was written with; copy it again"
        )
    if header.get("clip") != fingerprint(model.clip):
        raise ValueError(
            f"{path} was trained on another CLIP than {config.clip} with weights {config.clip_weights}: fingerprint "
            f"{header.get('clip')}, this one's {fingerprint(model.clip)}; give the CLIP that it was trained on"
        )
    return model.eval()


@contextmanager
def refusals_naming(path: Path) -> Iterator[None]:
    """Turns what a wrong configuration raises, in whichever part reads it, into one sentence that names the file."""
    try:
        yield
    except Misfit:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, AssertionError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{path} holds a wrong configuration: {' '.join(str(error).split())}") from error


class Misfit(ValueError):
    """Tensors that are not those of the configuration beside them."""


def check_fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    """Refuses a state whose names, shapes or kinds of number are not a model's own, or that is not finite."""
    wrong = sorted(set(own) ^ set(state)) or [
        name
        for name, value in state.items()
        if own[name].shape != value.shape or own[name].is_floating_point() != value.is_floating_point()
    ]
    if wrong:
        raise Misfit(
            f"{path} does not fit its configuration: {', '.join(wrong[:5])} differ; "
            f"the file was changed or is of another version"
        )
    broken = [name for name, value in state.items() if not value.float().isfinite().all()]
    if broken:
        raise Misfit(f"{path} holds values that are no numbers, in {', '.join(broken[:5])}; take an earlier checkpoint")


def read_header(path: Path) -> dict[str, Any]:
    """Configuration and remarks of a checkpoint, without its tensors."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}); "
            f"a checkpoint of the research code goes through sptseg import"
        ) from error
    try:
        header = json.loads(metadata["sptseg"])
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} holds no sptseg configuration; wanted a checkpoint written by sptseg train or sptseg import"
        ) from error
    found = header.get("format") if isinstance(header, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} has the format {found!r}; this version reads {FORMAT!r}")
    return header
