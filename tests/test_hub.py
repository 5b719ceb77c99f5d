"""The Hub: what is written is what is read; cards state what was given and nothing else; refusals are one sentence."""

import json
from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import load_reference, small_clip
from huggingface_hub import ModelCard, errors
from safetensors.torch import load_file, save_file

from sptseg import hub
from sptseg.checkpoints import read_header, save_model
from sptseg.clip import Clip, check_public
from sptseg.hub import from_pretrained, is_hub_id, load_model, push_to_hub, save_pretrained
from sptseg.metrics import Scores
from sptseg.model import ModelConfig, SptSeg, build_model

ABOUT = {"data": "drawn scenes", "split": "scenes", "unseen": ["tree", "boat"], "seeds": [3, 4], "license": "mit"}
MEASURED = {**ABOUT, "evaluated_on": "300 other scenes", "command": "sptseg evaluate --seed 0"}
SCORES = Scores(0.75, 0.5, 0.25, 1 / 3, {"grass": 0.5, "tree": 0.25, "boat": float("nan")})
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model() -> SptSeg:
    """A model whose CLIP travels in its file."""
    return load_reference("spt").imported.model


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


def same(a: SptSeg, b: SptSeg) -> bool:
    """Equal bits, CLIP's included."""
    states = [{**model.state_dict(), **model.clip.model.state_dict()} for model in (a, b)]
    return states[0].keys() == states[1].keys() and all(map(torch.equal, states[0].values(), states[1].values()))


# Folders


def test_a_folder_holds_three_files_and_gives_the_model_back(model: SptSeg, tmp_path: Path) -> None:
    folder = save_pretrained(model, tmp_path / "new" / "folder", about=MEASURED, scores=SCORES)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaded = from_pretrained(folder)
    assert same(loaded, model) and loaded.config == model.config and not loaded.training
    assert same(load_model(folder), model)
    settings = json.loads((folder / "config.json").read_text())
    assert settings["model"]["image_size"] == list(model.config.image_size)
    assert settings["about"] == read_header(folder / "model.safetensors")["about"] == MEASURED
    assert settings["scores"] == SCORES.as_dict()


def test_a_training_run_is_not_overwritten(model: SptSeg, tmp_path: Path) -> None:
    (tmp_path / "history.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a training run"):
        save_pretrained(model, tmp_path, about=ABOUT, scores=None)
    assert [path.name for path in tmp_path.iterdir()] == ["history.json"]


def test_only_the_weights_are_read(model: SptSeg, tmp_path: Path) -> None:
    folder = save_pretrained(model, tmp_path, about=ABOUT, scores=None)
    (folder / "config.json").write_text("not JSON")
    (folder / "README.md").unlink()
    assert same(from_pretrained(str(folder)), model)


# The card


def test_the_card_states_what_was_given(model: SptSeg, tmp_path: Path) -> None:
    card = ModelCard.load(save_pretrained(model, tmp_path / "mine", about=MEASURED, scores=SCORES) / "README.md")
    stated = ["drawn scenes", "unseen in training: tree, boat", "**seeds:** 3, 4", "300 other scenes"]
    stated += [
        "`sptseg evaluate --seed 0`",
        "no mean over seeds",
        'sptseg.load_model("mine")',
        "arxiv.org/abs/2312.12754",
    ]
    assert [text for text in stated if text not in card.text] == []
    assert SCORES.table() in card.text
    assert card.data.get("license") == "mit" and "arxiv:2312.12754" in card.data.get("tags")
    results = {
        result.metric_name: (result.metric_type, result.metric_value) for result in card.data.get("eval_results")
    }
    assert results == {
        "pixel_accuracy": ("accuracy", 0.75),
        "miou_seen": ("mean_iou", 0.5),
        "miou_unseen": ("mean_iou", 0.25),
        "hiou": ("hiou", 0.3333),
    }
    assert {result.dataset_name for result in card.data.get("eval_results")} == {"300 other scenes"}


def test_no_figure_is_invented(model: SptSeg, tmp_path: Path) -> None:
    bare = ModelCard.load(save_pretrained(model, tmp_path / "bare", about=ABOUT, scores=None) / "README.md")
    assert "None were given" in bare.text and "|" not in bare.text and bare.data.get("eval_results") is None
    supervised = replace(SCORES, miou_unseen=float("nan"), hiou=float("nan"))
    folder = save_pretrained(model, tmp_path / "part", about=MEASURED, scores=supervised)
    results = ModelCard.load(folder / "README.md").data.get("eval_results")
    assert [result.metric_name for result in results] == ["pixel_accuracy", "miou_seen"]


@pytest.mark.parametrize("missing", ["data", "split", "unseen", "seeds", "license", "evaluated_on"])
def test_a_card_with_a_gap_is_refused_before_anything_is_written(missing: str, model: SptSeg, tmp_path: Path) -> None:
    about = {key: value for key, value in MEASURED.items() if key != missing}
    with pytest.raises(ValueError, match=f"the card needs {missing};"):
        save_pretrained(model, tmp_path / "new", about=about, scores=SCORES)
    assert not (tmp_path / "new").exists()


def test_one_text_is_no_list_of_unseen_classes(model: SptSeg, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a list of names as unseen"):
        save_pretrained(model, tmp_path, about={**ABOUT, "unseen": "tree"}, scores=None)


def test_the_remarks_of_a_training_run_fill_the_card() -> None:
    model = build_model(ModelConfig(clip="small", image_size=(24, 40)), small_clip())
    about = {"data": "scenes", "split": "scenes", "unseen": [], "train": {"seed": 0}, "repo_id": "someone/model"}
    card = hub.model_card(model, about, None)
    assert "**seeds:** 0\n" in card.text and "unseen in training: none" in card.text
    assert card.data.get("license") == "apache-2.0"
    assert 'sptseg.segment(model, "photo.jpg", classes=["tree", "road"]).show()' in card.text


def test_the_example_in_the_card_runs(model: SptSeg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(save_pretrained(model, tmp_path / "mine", about=ABOUT, scores=None).parent)
    card = ModelCard.load("mine/README.md").text
    lines = card.split("```python\n")[1].split("\n```")[0].splitlines()
    assert lines[0] == "import sptseg" and len(lines) == 3
    scope = {"images": torch.rand(1, 3, *model.config.image_size), "text": torch.randn(2, model.clip.visual.output_dim)}
    exec("\n".join(lines[1:]), scope | {"sptseg": hub})


# The Hub


def test_a_hub_id_loads_from_the_cache_without_a_network(model: SptSeg, cache: Path) -> None:
    put(model, cache)
    assert same(load_model("someone/model"), model)
    assert same(from_pretrained("someone/model", revision=COMMIT), model)


def test_a_path_here_wins_over_the_hub(model: SptSeg, cache: Path) -> None:
    save_pretrained(model, "someone/model", about=ABOUT, scores=None)
    assert same(load_model("someone/model"), model)
    with pytest.raises(ValueError, match="is a folder here, without revisions such as 'main'"):
        from_pretrained("someone/model", revision="main")


def test_a_mistyped_path_is_not_asked_of_the_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(hub, "hf_hub_download")
    Path("runs").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no checkpoint runs/vok"):
        load_model("runs/vok")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("user/name", True),
        ("user-1/Name_2.x", True),
        ("name", False),
        ("embedded", False),
        ("a/b/c", False),
        ("./name", False),
        ("../name", False),
        ("/name", False),
        ("runs/model.safetensors", False),
        ("https://huggingface.co/user/name", False),
        (Path("user/name"), False),
    ],
)
def test_what_can_be_a_hub_id(source: str | Path, expected: bool) -> None:
    assert is_hub_id(source) is expected


@pytest.mark.parametrize("load", [load_model, from_pretrained])
def test_without_a_network_one_sentence_says_so(load: Callable, cache: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^someone/model, revision main, is not here, and the Hub cannot be"):
        load("someone/model")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.RemoteEntryNotFoundError, "holds no model.safetensors; wanted a model that sptseg pushed"),
        (errors.RepositoryNotFoundError, "is no path here and no open Hub repository"),
        (errors.GatedRepoError, "no open Hub repository; closed ones need `hf auth login`"),
        (errors.RevisionNotFoundError, "revision v9, does not exist"),
    ],
)
def test_the_hubs_refusals_are_one_sentence(
    kind: Callable[..., Exception], message: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> str:
        raise kind(
            "404 Client Error. (Request ID: Root=1-2-3)\n\nmany lines",
            response=SimpleNamespace(headers={}, request=None),
        )

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    with pytest.raises(FileNotFoundError, match=message) as caught:
        from_pretrained("someone/model", revision="v9")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["nowhere", Path("some/where")])
def test_neither_a_folder_nor_an_id(source: str | Path, cache: Path) -> None:
    with pytest.raises(FileNotFoundError, match="wanted a folder that holds it, or a Hub id owner/name"):
        from_pretrained(source)


# CLIP weights that do not travel


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("small", None),
        ("tiny", "/tmp/tiny.safetensors"),
        ("ViT-B-16-quickgelu", None),
        ("ViT-B-16-quickgelu", "weights.pt"),
        ("hf-hub:someone/clip", "openai"),
    ],
)
def test_weights_that_others_lack_are_refused(name: str, weights: str | None) -> None:
    with pytest.raises(ValueError, match=r"model.safetensors names CLIP .* which is not public, and no path"):
        check_public(name, weights, "model.safetensors")


@pytest.mark.parametrize(("name", "weights"), [("tiny", None), ("ViT-B-16-quickgelu", "openai")])
def test_weights_that_everybody_has_are_accepted(name: str, weights: str | None) -> None:
    check_public(name, weights, "model.safetensors")


def test_a_model_on_private_weights_is_not_written(clip: Clip, tmp_path: Path) -> None:
    model = build_model(ModelConfig(clip="small", image_size=(24, 40)), clip)
    with pytest.raises(ValueError, match="is not public"):
        save_pretrained(model, tmp_path / "new", about=ABOUT, scores=None)
    assert not (tmp_path / "new").exists()


def test_no_path_in_a_download_is_opened(
    model: SptSeg, clip: Clip, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*args: object) -> None:
        raise AssertionError(f"load_clip{args} was called")

    folder = put(model, cache)
    evil = ModelConfig(clip="tiny", clip_weights="/etc/passwd", image_size=(24, 40))
    save_model(build_model(evil, clip), folder)
    monkeypatch.setattr("sptseg.model.load_clip", opened)
    for source in ("someone/model", folder):
        with pytest.raises(ValueError, match="'/etc/passwd', which is not public"):
            from_pretrained(source)
    with pytest.raises(ValueError, match="'/etc/passwd', which is not public"):
        load_model("someone/model")
    assert from_pretrained("someone/model", clip=clip).clip is clip  # the caller's own CLIP: nothing is looked up


@pytest.mark.parametrize("header", [{}, {"config": None}, {"config": []}, {"config": {}}, {"config": {"clip": {}}}])
def test_a_broken_configuration_is_refused(header: dict, model: SptSeg, tmp_path: Path) -> None:
    path = save_pretrained(model, tmp_path, about=ABOUT, scores=None) / "model.safetensors"
    save_file(load_file(path), path, metadata={"sptseg": json.dumps({"format": "sptseg-1", **header})})
    with pytest.raises(ValueError, match="holds a wrong configuration|does not fit its configuration|is not public"):
        from_pretrained(tmp_path)


# Pushing


class FakeHub:
    """Stands for `HfApi`: remembers calls, and what the uploaded folder held."""

    def __init__(self, exists_public: bool = False) -> None:
        self.calls: list[tuple] = []
        self.exists_public = exists_public

    def __call__(self, library_name: str) -> "FakeHub":
        return self

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self.calls.append(("create_repo", repo_id, private, exist_ok))

    def model_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(private=not self.exists_public)

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> SimpleNamespace:
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.calls.append(("upload_folder", repo_id))
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/{COMMIT}")


@pytest.mark.parametrize("private", [False, True])
def test_push_uploads_the_three_files(private: bool, model: SptSeg, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub()
    monkeypatch.setattr(hub, "HfApi", fake)
    url = push_to_hub(model, "someone/model", about=MEASURED, scores=SCORES, private=private)
    assert url.endswith(COMMIT)
    assert fake.calls == [("create_repo", "someone/model", private, True), ("upload_folder", "someone/model")]
    assert set(fake.files) == {"README.md", "config.json", "model.safetensors"}
    assert b'sptseg.load_model("someone/model")' in fake.files["README.md"]


def test_private_never_goes_to_a_public_repository(model: SptSeg, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub(exists_public=True)
    monkeypatch.setattr(hub, "HfApi", fake)
    with pytest.raises(ValueError, match="exists and is public, so nothing was pushed"):
        push_to_hub(model, "someone/model", about=ABOUT, scores=None, private=True)
    assert not hasattr(fake, "files")


def test_the_calls_fit_the_real_api() -> None:
    for name, options in {
        "create_repo": {"private": False, "exist_ok": True},
        "model_info": {},
        "upload_folder": {"folder_path": "x", "commit_message": "y"},
    }.items():
        signature(getattr(huggingface_hub.HfApi(), name)).bind(repo_id="someone/model", **options)


def test_a_name_without_owner_is_not_pushed(model: SptSeg) -> None:
    with pytest.raises(ValueError, match="'model' is no Hub id; wanted owner/name"):
        push_to_hub(model, "model", about=ABOUT, scores=None)
