"""The demonstration's page shows what was computed, and stands on its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree.ElementTree import Element, fromstring

import numpy as np
import pytest

from sptseg import scenes
from sptseg.cli import demo
from sptseg.datasets import plots, splits
from sptseg.inference import Scores

SPLIT = splits.scenes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run on two scenes and with two small steps leaves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "BATCH", 2)
        return demo.demo(tmp_path_factory.mktemp("the") / "my demo", seed=5, scenes=2, iterations=2).parent


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return (folder / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Element:
    """The page's tags, each closed in its turn."""
    return fromstring(html)


def test_the_page_is_semantic_and_asks_for_nothing_over_the_network(html: str, page: Element) -> None:
    addresses = [tag.attrib[name] for tag in page.iter() for name in ("src", "href") if name in tag.attrib]
    assert addresses and all(address.startswith("data:image/png;base64,") for address in addresses)
    assert not {"script", "link", "iframe", "object", "form"} & {tag.tag for tag in page.iter()}
    assert not re.search(r"https?:|@import|url\(|//[a-z]", re.sub(r"base64,[^\"]*", "", html))
    assert page.tag == "html" and page.attrib["lang"] == "en"
    for tag in ("title", "h1", "main", "header", "footer", "table", "caption"):
        assert len([*page.iter(tag)]) == 1, tag
    headings = {tag.attrib["id"] for tag in page.iter("h2")}
    assert {tag.attrib["aria-labelledby"] for tag in page.iter("section")} == headings
    assert all(tag.attrib["scope"] in ("col", "row") for tag in page.iter("th"))


def test_every_image_says_what_it_shows(page: Element) -> None:
    texts = [tag.attrib["alt"] for tag in page.iter("img")]
    assert len(texts) == 1 + 2 + 1 + 2, "a scene, the first ones, one by free phrases, charts"
    assert all(len(text) > 15 for text in texts) and len(set(texts)) == len(texts)
    _, truth = scenes.draw((0, 5, 0))
    label = plots.present(truth)[0]
    named = plots.marked(SPLIT.classes[label], SPLIT.names(SPLIT.unseen))
    assert any(f"Scene 1, truth: {named} {100 * (truth == label).mean():.0f} %" in text for text in texts)


def test_the_folder_holds_pictures_figures_and_a_table_that_agree(folder: Path, page: Element) -> None:
    names = {"scene-1", "scene-2", "free-phrases", "picture", "class-iou", "training"}
    assert {path.stem for path in folder.glob("*.png")} == names
    results = json.loads((folder / "results.json").read_text())
    assert (results["seed"], results["scenes"], len(results["history"])) == (5, 2, 2)
    assert tuple(results["scores"]) == (*demo.MODELS.values(), demo.TRAINED)
    markdown = (folder / "table.md").read_text(encoding="utf-8").splitlines()
    head, *rows = ([str(cell.text) for cell in row] for row in page.iter("tr"))
    assert head == ["model", "pAcc", "mIoU(S)", "mIoU(U)", "hIoU"]
    for row, line, (title, scores) in zip(rows, markdown[2:6], results["scores"].items(), strict=True):
        figures = (scores[key] for key in ("pixel_accuracy", "miou_seen", "miou_unseen", "hiou"))
        assert row == [title, *("–" if each is None else f"{100 * each:.1f}" for each in figures)]
        assert line == f"| {' | '.join(row)} |"


def test_missing_figures_show_as_a_dash_and_words_are_escaped() -> None:
    html = demo.Picture(b"", '"<b>', "<i>&").html()
    assert html.endswith('alt="&quot;&lt;b&gt;"/><figcaption>&lt;i&gt;&amp;</figcaption></figure>')
    assert Scores(0.5, float("nan"), 0.25, float("nan"), {}).cells() == ["50.0", "–", "25.0", "–"]


def test_page_says_how_little_its_figures_mean_and_what_to_do_next(folder: Path, page: Element) -> None:
    text = " ".join(" ".join(map(str, page.itertext())).split())
    assert "2 scenes (seed 5)" in text and "chance" in text and "data/README.md" in text
    assert "2 steps of 2 pictures" in text and "31 seen classes only" in text
    assert f"sptseg segment '{folder}/picture.png' --classes" in text and "--seed 6 " in text


def test_free_phrases_are_in_the_tiny_clips_vocabulary_and_true_of_the_scene() -> None:
    assert {word for phrase in demo.FREE_CLASSES for word in phrase.split()} <= set(scenes.WORDS)
    _, label = scenes.draw(demo.FREE_SEED)
    in_view = set(SPLIT.names(np.unique(label).tolist()))
    nouns = {name for name in SPLIT.classes for phrase in demo.FREE_CLASSES if phrase.endswith(f" {name}")}
    assert nouns - in_view == {"castle"} and in_view <= nouns
