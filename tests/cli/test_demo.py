"""The demonstration's page shows what was computed, and stands on its own."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from sptseg import scenes
from sptseg.cli import demo
from sptseg.datasets import plots, splits
from sptseg.inference.metrics import Scores

SPLIT = splits.scenes()


class Page(HTMLParser):
    """Tags with their attributes, table cells and visible text; checks that every tag is closed in its turn."""

    VOID = ("meta", "img", "link", "br", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def of(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


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
def page(html: str) -> Page:
    return Page(html)


def test_page_asks_for_nothing_over_the_network(html: str, page: Page) -> None:
    addresses = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert addresses and all(address.startswith("data:image/png;base64,") for address in addresses if address)
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?:|@import|url\(|//[a-z]", re.sub(r"base64,[^\"]*", "", html))


def test_page_is_whole_and_semantic(page: Page) -> None:
    assert page.open == [], "every tag is closed"
    assert page.of("html")[0]["lang"] == "en"
    tags = [tag for tag, _ in page.tags]
    assert [tags.count(tag) for tag in ("title", "h1", "main", "header", "footer", "table", "caption")] == [1] * 7
    headings = {attributes["id"] for attributes in page.of("h2")}
    assert {attributes["aria-labelledby"] for attributes in page.of("section")} == headings
    assert all(attributes["scope"] in ("col", "row") for attributes in page.of("th"))
    assert "$" not in page.text


def test_every_image_says_what_it_shows(page: Page) -> None:
    texts = [str(image["alt"]) for image in page.of("img")]
    assert len(texts) == 1 + 2 + 2 + 2, "halves, scenes, free phrases and their scores, charts"
    assert all(len(text) > 15 for text in texts) and len(set(texts)) == len(texts)
    _, truth = scenes.draw((0, 5, 0))
    label = plots.present(truth)[0]
    named = plots.marked(SPLIT.classes[label], SPLIT.names(SPLIT.unseen))
    assert any(f"Scene 1, truth: {named} {100 * (truth == label).mean():.0f} %" in text for text in texts)


def test_the_folder_holds_pictures_figures_and_a_table_that_agree(folder: Path, page: Page) -> None:
    names = {"scene-1", "scene-2", "free-phrases", "picture", "halves", "class-iou", "scores", "training"}
    assert {path.stem for path in folder.glob("*.png")} == names
    results = json.loads((folder / "results.json").read_text())
    assert (results["seed"], results["scenes"], len(results["history"])) == (5, 2, 2)
    assert tuple(results["scores"]) == (*demo.MODELS.values(), demo.TRAINED)
    markdown = (folder / "table.md").read_text(encoding="utf-8").splitlines()
    assert page.rows[0] == ["model", "pAcc", "mIoU(S)", "mIoU(U)", "hIoU"]
    for row, line, (title, scores) in zip(page.rows[1:], markdown[2:6], results["scores"].items(), strict=True):
        figures = (scores[key] for key in ("pixel_accuracy", "miou_seen", "miou_unseen", "hiou"))
        assert row == [title, *("–" if each is None else f"{100 * each:.1f}" for each in figures)]
        assert line == f"| {' | '.join(row)} |"


def test_missing_figures_show_as_a_dash() -> None:
    nothing = Scores(0.5, float("nan"), 0.25, float("nan"), {})
    assert demo.markdown_table({"m": nothing}).endswith("| m | 50.0 | – | 25.0 | – |")


def test_page_says_how_little_its_figures_mean_and_what_to_do_next(folder: Path, page: Page) -> None:
    text = " ".join(page.text.split())
    assert "2 scenes (seed 5)" in text and "chance" in text and "data/README.md" in text
    assert "2 steps of 2 pictures" in text and "31 seen classes only" in text
    assert f"sptseg segment '{folder}/picture.png' --classes" in text and "--seed 6 " in text


def test_what_a_picture_shows_is_escaped() -> None:
    html = demo.Picture(b"", '"<b>', "<i>&").html()
    assert html.endswith('alt="&quot;&lt;b&gt;"><figcaption>&lt;i&gt;&amp;</figcaption></figure>')


def test_free_phrases_are_in_the_tiny_clips_vocabulary_and_true_of_the_scene() -> None:
    assert {word for phrase in demo.FREE_CLASSES for word in phrase.split()} <= set(scenes.WORDS)
    _, label = scenes.draw(demo.FREE_SEED)
    in_view = set(SPLIT.names(np.unique(label).tolist()))
    nouns = {name for name in SPLIT.classes for phrase in demo.FREE_CLASSES if phrase.endswith(f" {name}")}
    assert nouns - in_view == {"castle"} and in_view <= nouns
