"""The Hub: what is written is what is read; cards state what was given and nothing else; refusals are one sentence."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, create_autospec

import huggingface_hub
import pytest
import torch
from conftest import load_reference, small_clip
from huggingface_hub import ModelCard, errors
from torch import Tensor
from toys import same

from sptseg.checkpoints import checkpoint as checkpoints
from sptseg.checkpoints import from_pretrained, load_model, push_to_hub, save_model, save_pretrained
from sptseg.inference import Scores
from sptseg.model import Clip, ModelConfig, SptSeg, build_model, check_public

ABOUT = {"data": "drawn scenes", "split": "scenes", "unseen": ["tree", "boat"], "seeds": [3, 4], "license": "mit"}
MEASURED = {**ABOUT, "evaluated_on": "300 other scenes", "command": "sptseg evaluate --seed 0"}
SCORES = Scores(0.75, 0.5, 0.25, 1 / 3, {"grass": 0.5, "tree": 0.25, "boat": float("nan")})
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model() -> SptSeg:
    """A model whose CLIP travels in its file."""
    return load_reference("spt").imported


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache, and no network: the real `hf_hub_download` looks nowhere else."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def put(model: SptSeg, cache: Path) -> Path:
    """The folder of a repository "someone/model" in the cache, as a download leaves it."""
    repository = cache / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return save_pretrained(model, repository / "snapshots" / COMMIT, about=ABOUT, scores=None)


def bits(model: SptSeg) -> dict[str, Tensor]:
    """CLIP's included."""
    return {**model.state_dict(), **model.clip.model.state_dict()}


def test_a_folder_holds_three_files_of_which_one_is_read(model: SptSeg, tmp_path: Path) -> None:
    folder = save_pretrained(model, tmp_path / "new" / "folder", about=MEASURED, scores=SCORES)
    settings = json.loads((folder / "config.json").read_text())
    assert settings["model"]["image_size"] == list(model.config.image_size)
    assert settings["about"] == checkpoints.read_header(folder / "model.safetensors")["about"] == MEASURED
    assert settings["scores"] == SCORES.as_dict()
    (folder / "config.json").write_text("not JSON")
    (folder / "README.md").unlink()
    loaded = from_pretrained(str(folder))
    assert same(bits(loaded), bits(model)) and loaded.config == model.config and not loaded.training


def test_a_card_states_what_is_given_and_runs(model: SptSeg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = ModelCard.load(save_pretrained(model, tmp_path / "mine", about=MEASURED, scores=SCORES) / "README.md")
    stated = ["drawn scenes", "unseen in training: tree, boat", "**seeds:** 3, 4", "300 other scenes", SCORES.table()]
    stated += ["`sptseg evaluate --seed 0`", "arxiv.org/abs/2312.12754"]
    assert [text for text in stated if text not in card.text] == []
    assert card.data.get("license") == "mit" and "arxiv:2312.12754" in card.data.get("tags")
    monkeypatch.chdir(tmp_path)
    example = card.text.split("```python\n")[1].split("\n```")[0]
    assert example.startswith('import sptseg\nmodel = sptseg.load_model("mine")\n')
    exec(example, {"images": torch.rand(1, 3, *model.config.image_size), "text": torch.randn(2, 32)})
    bare = ModelCard.load(save_pretrained(model, tmp_path / "bare", about=ABOUT, scores=None) / "README.md")
    assert "None were given" in bare.text and "|" not in bare.text, "no figure is invented"


@pytest.mark.parametrize("missing", ["data", "split", "unseen", "seeds", "license", "evaluated_on", "a list of names"])
def test_a_card_with_a_gap_is_refused_before_anything_is_written(missing: str, model: SptSeg, tmp_path: Path) -> None:
    about = {**MEASURED, missing: None} if missing in MEASURED else {**MEASURED, "unseen": "tree"}
    with pytest.raises(ValueError, match=f"the card needs {missing}"):
        save_pretrained(model, tmp_path / "new", about=about, scores=SCORES)
    assert not (tmp_path / "new").exists()


def test_the_remarks_of_a_training_run_fill_the_card_and_its_folder_is_kept(model: SptSeg, tmp_path: Path) -> None:
    small = build_model(ModelConfig(clip="small", image_size=(24, 40)), small_clip())
    about = {"data": "scenes", "split": "scenes", "unseen": [], "train": {"seed": 0}, "repo_id": "someone/model"}
    card = checkpoints.model_card(small, about, None)
    assert "**seeds:** 0\n" in card.text and "unseen in training: none" in card.text
    assert card.data.get("license") == "apache-2.0"
    assert 'sptseg.segment(model, "photo.jpg", classes=["tree", "road"]).show()' in card.text
    (tmp_path / "history.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a training run"):
        save_pretrained(model, tmp_path, about=ABOUT, scores=None)
    assert [path.name for path in tmp_path.iterdir()] == ["history.json"]


def test_a_hub_id_loads_from_the_cache_without_a_network(model: SptSeg, cache: Path) -> None:
    put(model, cache)
    assert same(bits(load_model("someone/model")), bits(model))
    save_pretrained(model, "someone/model", about=ABOUT, scores=None)  # a path here wins
    Path("someone/model/model.safetensors").write_bytes(b"another")
    with pytest.raises(ValueError, match="someone/model/model.safetensors is no checkpoint"):
        load_model("someone/model")


def test_a_mistyped_path_is_not_asked_of_the_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(checkpoints, "hf_hub_download")
    Path("runs").mkdir()
    others = "runs/vok nowhere ~/nothing some/M.SAFETENSORS a/b/c ./name ../name /name https://huggingface.co/user/name"
    for source in (*others.split(), Path("some/where")):
        with pytest.raises(FileNotFoundError, match="there is no checkpoint .*; wanted .* or a Hub id"):
            load_model(source)
    assert all(map(checkpoints.is_hub_id, ("user/name", "user-1/Name_2.x")))


@pytest.mark.parametrize("kind", [None, "RemoteEntryNotFoundError", "RepositoryNotFoundError", "GatedRepoError"])
def test_the_hubs_refusals_are_one_sentence(kind: str | None, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network; and what the network may answer."""
    if kind:
        response = SimpleNamespace(headers={}, request=None)
        error = getattr(errors, kind)("404 Client Error. (Request ID: Root=1-2-3)\n\nmany lines", response=response)
        monkeypatch.setattr(checkpoints, "hf_hub_download", Mock(side_effect=error))
    with pytest.raises(FileNotFoundError, match=r"^someone/model is no path here, and its model.safetensors") as said:
        from_pretrained("someone/model")
    assert "\n" not in str(said.value) and (kind or "LocalEntryNotFoundError") in str(said.value)


def test_private_clips_are_not_written(model: SptSeg, clip: Clip, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded, quick = "tiny", "ViT-B-16-quickgelu"
    others = (("small", None), (embedded, "/x.safetensors"), (quick, None), (quick, "w.pt"), ("hf-hub:a/b", "openai"))
    for name, weights in others:
        with pytest.raises(ValueError, match=r"its CLIP, .*, is not public, and no path"):
            check_public(name, weights)
    check_public(embedded, None)
    check_public(quick, "openai")
    folder = put(model, cache)
    evil = build_model(ModelConfig(clip="tiny", clip_weights="/etc/passwd", image_size=(24, 40)), clip)
    with pytest.raises(ValueError, match="is not public"):
        save_pretrained(evil, "new", about=ABOUT, scores=None)
    assert not Path("new").exists()
    save_model(evil, folder)
    monkeypatch.setattr(checkpoints, "load_clip", lambda *_: pytest.fail("opened"))
    with pytest.raises(ValueError, match="'/etc/passwd', is not public"):
        from_pretrained("someone/model")
    assert from_pretrained("someone/model", clip=clip).clip is clip  # the caller's own CLIP: nothing is looked up


@pytest.mark.parametrize("private", [False, True])
def test_push_uploads_three_files(private: bool, model: SptSeg, monkeypatch: pytest.MonkeyPatch) -> None:
    """To what stands for `HfApi`, which is called as the real one may be; private ones never where all may read."""
    api, files = create_autospec(huggingface_hub.HfApi, instance=True), {}
    api.model_info.return_value.private = False

    def upload(*, folder_path: str, **_: object) -> SimpleNamespace:
        files.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})
        return SimpleNamespace(commit_url=f"https://huggingface.co/someone/model/commit/{COMMIT}")

    api.upload_folder.side_effect = upload
    monkeypatch.setattr(checkpoints, "HfApi", lambda library_name: api)
    push = partial(push_to_hub, model, about=MEASURED, scores=SCORES, private=private)
    with pytest.raises(ValueError, match="'model' is no Hub id; wanted owner/name"):
        push("model")
    if private:
        with pytest.raises(ValueError, match="exists and is public, so nothing was pushed"):
            push("someone/model")
        assert files == {}
        api.model_info.return_value.private = True
    assert push("someone/model").endswith(COMMIT)
    api.create_repo.assert_called_with("someone/model", private=private, exist_ok=True)
    assert api.upload_folder.call_args.kwargs["repo_id"] == "someone/model"
    assert set(files) == {"README.md", "config.json", "model.safetensors"}
    assert b'sptseg.load_model("someone/model")' in files["README.md"]
