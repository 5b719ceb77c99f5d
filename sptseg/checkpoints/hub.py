"""Hugging Face Hub: models are pushed with a card that states data, split, seeds and figures."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData

from sptseg.checkpoints.checkpoint import WEIGHTS_FILE, is_hub_id, save_model
from sptseg.checkpoints.research import IMPORTED, refuse_text
from sptseg.inference import Scores
from sptseg.model import SptSeg, check_public
from sptseg.system import write

About = Mapping[str, Any]  # JSON values
METHODS = {"spectral": "SPT-SEG", "cross_attention": "ZegCLIP", "none": "dense CLIP"}
TAGS = ["zero-shot", "semantic-segmentation", "clip", "arxiv:2312.12754"]
CARD = Path(__file__).with_name("card.txt")


def save_pretrained(model: SptSeg, folder: str | Path, *, about: About, scores: Scores | None) -> Path:
    """Writes `model.safetensors`, `config.json` and the card `README.md` into a folder of their own; returns it.

    `about`: `data`, `split` (name), `unseen` (list of names), `seeds` (default: the `train["seed"]` that `fit` stores),
    `license` (a Hub identifier; default apache-2.0, none for imported weights), with this model's `scores` also
    `evaluated_on` and perhaps `command`, and anything else.
    """
    folder = Path(folder).expanduser()
    if model.config.clip != IMPORTED:
        check_public(model.config.clip, model.config.clip_weights)
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
