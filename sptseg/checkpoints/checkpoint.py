"""Checkpoints: trained parts in safetensors, their configuration as JSON in the header; with a card on the Hub.

They may come from strangers: nothing is executed, no path opened, nothing made of a size that the tensors lack."""

import dataclasses
import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData, hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from sptseg.checkpoints.research import IMPORTED, check_architecture, clip_from_architecture, refuse_text
from sptseg.inference import Scores, fitted
from sptseg.model import DENSE_CLIP, Clip, ModelConfig, SptSeg, build_model, default_readout, load_clip
from sptseg.model import clip as clips
from sptseg.system import write

FORMAT = "sptseg-1"
EMBEDDED = {  # on the tiny CLIP that is dense, and on the plain one
    "embedded": "spt_seg.safetensors",
    "embedded-zegclip": "zegclip.safetensors",
    "embedded-plain": "plain_naclip.safetensors",
    "embedded-plain-released": "plain_released.safetensors",
    "embedded-plain-zegclip": "plain_zegclip.safetensors",
}
WEIGHTS_FILE = "model.safetensors"
METHODS = {"spectral": "SPT-SEG", "cross_attention": "ZegCLIP", "none": "dense CLIP"}
TAGS = ["zero-shot", "semantic-segmentation", "clip", "arxiv:2312.12754"]
CARD = Path(__file__).with_name("card.txt")
About = Mapping[str, Any]  # JSON values


def with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's JSON values with those that are younger than its file."""
    return json.loads(json.dumps(dataclasses.asdict(ModelConfig(**with_tuples(values)))))


def save_model(model: SptSeg, path: str | Path, about: Mapping[str, Any] | None = None, *, half: bool = False) -> Path:
    """Writes the trained parts and the configuration to one safetensors file (in a folder: `model.safetensors`), whole
    or not at all. `about` (JSON values) is kept with them; `half` stores float16, which loads as float32."""
    path = Path(path).expanduser()
    if path.suffix.lower() != ".safetensors":
        path = path / WEIGHTS_FILE
    header: dict[str, Any] = {"format": FORMAT, "config": dataclasses.asdict(model.config), "about": dict(about or {})}
    header["clip"] = clips.fingerprint(model.clip)
    state = model.trained_state()
    if model.config.clip == IMPORTED:
        state |= {f"clip.{name}": value for name, value in model.clip.model.state_dict().items()}
        header["architecture"] = model.clip.architecture
    tensors = {name: (value.half() if half else value).detach().cpu().contiguous() for name, value in state.items()}
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
            patch embeddings; of another `clip` by `default_readout`), a checkpoint file, a folder that holds one, or a
            Hub id, "owner/name", if there is no folder "owner" here. What has one of these names is meant by a path
            such as "./embedded".
        clip: the CLIP model to use, if it is already loaded, or if its weights are a file of yours: a path that stands
            in a checkpoint is not opened."""
    if source == "dense-clip":
        clip = load_clip() if clip is None else clip
        config = dataclasses.replace(DENSE_CLIP, readout=default_readout(clip.name))
        return build_model(fitted(config, clip), clip).eval()
    path = find_checkpoint(source)
    header, state = read_header(path), load_file(path)
    if header.get("sha256") not in (None, checksum(state)):  # the earliest files have none
        raise ValueError(f"{path} is damaged: its tensors have another checksum than as written; copy it again")
    try:
        return assembled(header, state, clip).eval()
    except Exception as error:  # there is no list of what a stranger's values may raise, in whichever part reads them
        reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{path} cannot be loaded: {reason}") from error


from_pretrained = load_model  # by the name that Hugging Face's libraries have for it


def assembled(header: Mapping[str, Any], state: Mapping[str, Tensor], clip: Clip | None) -> SptSeg:
    """The model of a checkpoint's header and tensors."""
    config = ModelConfig(**with_tuples(header["config"]))  # a field that is younger than the file takes its default
    if config.clip == IMPORTED:
        tower = {name.removeprefix("clip."): value for name, value in state.items() if name.startswith("clip.")}
        state = {name: value for name, value in state.items() if not name.startswith("clip.")}
        check_architecture(header["architecture"], len(tower))
        with torch.device("meta"):  # sizes without memory: they may be anything
            check_fit(clip_from_architecture(header["architecture"]).model.state_dict(), tower)
        clip = clip_from_architecture(header["architecture"])
        clip.model.load_state_dict(tower)
    elif clip is None:
        clips.check_public(config.clip, config.clip_weights)
        clip = load_clip(config.clip, config.clip_weights)
    with torch.device("meta"):
        check_fit(build_model(config, clip).trained_state(), state)
    known = str(header.get("clip"))
    renamed = len(known) == clips.OLD_FINGERPRINT and clip.name != config.clip  # it does not tell activations apart
    if config.clip != IMPORTED and (renamed or known != clips.fingerprint(clip, like=known)):
        told = f"it was trained on another CLIP than this {clip.name} with weights {clip.weights}; give the one that it"
        raise ValueError(f"{told} was trained on, {config.clip} with weights {config.clip_weights}")
    model = build_model(config, clip)
    model.load_state_dict(state, strict=False)
    model.about = header.get("about", {})
    return model


def find_checkpoint(source: str | Path) -> Path:
    """The file that `load_model` reads; one of the Hub is downloaded."""
    if source in EMBEDDED:
        return clips.data_file(EMBEDDED[str(source)])
    path = Path(source).expanduser()
    file = path / WEIGHTS_FILE if path.is_dir() else path
    if file.is_file():
        return file
    if not is_hub_id(source) or path.parent.is_dir():  # a mistyped path is not the Hub's
        known = ", ".join((*EMBEDDED, "dense-clip", "a file, a folder or a Hub id owner/name"))
        raise FileNotFoundError(f"there is no checkpoint {file}; wanted {known}")
    try:
        return Path(hf_hub_download(str(source), WEIGHTS_FILE))
    except (OSError, ValueError) as error:  # huggingface_hub's own are of these two kinds
        told = f"{source} is no path here, and its {WEIGHTS_FILE} could not be had from the Hub"
        advice = "check name and network; closed ones need `hf auth login`"
        raise FileNotFoundError(f"{told} ({type(error).__name__}); {advice}") from error


def is_hub_id(source: object) -> bool:
    """Whether this can be a Hub id, "owner/name"; a `Path` never is, nor is a checkpoint's file name."""
    return isinstance(source, str) and bool(re.fullmatch(r"(?ai)\w[\w.-]*/\w[\w.-]*(?<!\.safetensors)", source))


def check_fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Refuses a state whose names, shapes or kinds of number are not a model's own, or that is not finite."""
    kinds, theirs = ({k: (v.shape, v.is_floating_point()) for k, v in tensors.items()} for tensors in (own, state))
    wrong = sorted({name for name, _ in kinds.items() ^ theirs.items()})
    if wrong:
        raise ValueError(f"{', '.join(wrong[:5])} of its tensors are not those of its configuration")
    broken = [name for name, value in state.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(f"it holds values that are no numbers, in {', '.join(broken[:5])}; take an earlier checkpoint")


def read_header(path: Path) -> dict[str, Any]:
    """Configuration and remarks of a checkpoint, without its tensors."""
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("sptseg", "null"))
        found = header.get("format") if isinstance(header, dict) else None
        if found != FORMAT:
            raise ValueError(f"its format is {found!r}, not {FORMAT!r}")
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        wanted = "wanted one written by sptseg train, or by sptseg import, which reads those of the research code"
        raise ValueError(f"{path} is no checkpoint of sptseg ({' '.join(str(error).split())}); {wanted}") from error
    return header


def save_pretrained(model: SptSeg, folder: str | Path, *, about: About, scores: Scores | None) -> Path:
    """Writes `model.safetensors`, `config.json` and the card `README.md` into a folder of their own; returns it.

    `about`: `data`, `split` (name), `unseen` (list of names), `seeds` (default: the `train["seed"]` that `fit` stores),
    `license` (a Hub identifier; default apache-2.0, none for imported weights), with this model's `scores` also
    `evaluated_on` and perhaps `command`, and anything else."""
    folder = Path(folder).expanduser()
    if model.config.clip != IMPORTED:
        clips.check_public(model.config.clip, model.config.clip_weights)
    if (folder / "history.json").exists():
        raise ValueError(f"{folder} holds a training run, whose config.json would be lost; give another folder")
    card = model_card(model, {"repo_id": folder.resolve().name, **about}, scores)
    save_model(model, folder / WEIGHTS_FILE, about)
    settings = {"model": dataclasses.asdict(model.config), "about": dict(about), "scores": scores and scores.as_dict()}
    write(folder / "config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    write(folder / "README.md", str(card))
    return folder


def model_card(model: SptSeg, about: About, scores: Scores | None) -> ModelCard:
    """The card of a model that `about["repo_id"]` is loaded from; refuses to leave out what a reader must know."""
    imported = model.config.clip == IMPORTED  # weights under a licence that only its owner knows
    facts = {"seeds": about.get("train", {}).get("seed"), "license": None if imported else "apache-2.0", **about}
    wanted = ("data", "split", "unseen", "seeds", "license", *(["evaluated_on"] if scores else []))
    missing = [key for key in wanted if facts.get(key) in (None, "")]
    if missing or isinstance(facts["unseen"], str):
        raise ValueError(f"the card needs {', '.join(missing) or 'a list of names as unseen'}; complete about")
    example = json.dumps(facts["unseen"][:2] or ["tree", "road"])
    facts |= {
        "title": f"{METHODS[model.config.decoder]}, {facts['split']}",
        "classes": ", ".join(facts["unseen"]) or "none",
        "seeds": str(facts["seeds"]).strip("[](),"),
        "clip": "in the file" if imported else f"{model.config.clip} {model.config.clip_weights or '(embedded)'}",
        "use": f'sptseg.segment(model, "photo.jpg", classes={example}).show()',
        "figures": "None were given with this model.",
    }
    if model.clip.tokenizer is refuse_text:
        facts["use"] = "mask_logits = model(images, text)  # unit embeddings (C, E); the file has no text encoder"
    if scores:
        where = f"On {facts['evaluated_on']}" + (f" (`{facts['command']}`)" if "command" in facts else "")
        note = "in percent (S: seen, U: unseen classes); one checkpoint's, no mean over seeds, which differ much in U"
        facts["figures"] = f"{where}, {note}.\n\n{scores.table()}"
    kind = {"license": facts["license"], "library_name": "sptseg", "pipeline_tag": "image-segmentation", "tags": TAGS}
    return ModelCard(CARD.read_text("utf-8").format(**facts, metadata=ModelCardData(**kind).to_yaml()))


def push_to_hub(model: SptSeg, repo_id: str, *, about: About, scores: Scores | None, private: bool = False) -> str:
    """Uploads what `save_pretrained` writes in one commit, to a new repository if need be; returns the commit's URL."""
    if not is_hub_id(repo_id):
        raise ValueError(f"{repo_id!r} is no Hub id; wanted owner/name")
    with tempfile.TemporaryDirectory() as temporary:
        save_pretrained(model, temporary, about={**about, "repo_id": repo_id}, scores=scores)
        api = HfApi(library_name="sptseg")
        api.create_repo(repo_id, private=private, exist_ok=True)  # which leaves an existing one as public as it is
        if private and not api.model_info(repo_id).private:
            raise ValueError(f"{repo_id} exists and is public, so nothing was pushed; make it private, or rename")
        return api.upload_folder(repo_id=repo_id, folder_path=temporary, commit_message="Upload model").commit_url
