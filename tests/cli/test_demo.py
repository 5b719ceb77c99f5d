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
from sptseg.datasets import images, plots, splits
from sptseg.datasets.splits import spread_palette
from sptseg.inference.metrics import Scores

SPLIT = splits.scenes()
UNSEEN = SPLIT.names(SPLIT.unseen)
TITLES = (*demo.MODELS.values(), demo.TRAINED)


def guess(label: np.ndarray, classes: int, seed: int) -> np.ndarray:
    """A plausible prediction: the truth in blocks of 4 x 4, some of them wrong."""
    rng = np.random.default_rng(seed)
    blocks = label[::4, ::4].copy()
    blocks[8:14, 6:16] = rng.integers(classes)
    return images.enlarge(blocks, 4)


@pytest.fixture(scope="module")
def results() -> demo.Results:
    """Made-up results of four models on two drawn scenes, one class without a score."""
    rng = np.random.default_rng(0)
    gallery = []
    for i in range(2):
        image, truth = scenes.draw((0, 1, i))
        gallery.append(
            demo.Plate(f"Scene {i + 1}", image, guess(truth, 41, i), truth, SPLIT.classes, SPLIT.palette, UNSEEN)
        )
    image, truth = scenes.draw(demo.FREE_SEED)
    phrases = demo.FREE_CLASSES
    colours = spread_palette(len(phrases))
    order = np.unique(truth)
    free = demo.Plate("Free phrases", image, np.searchsorted(order, truth), None, phrases, colours, phrases[1:4])
    scores = {}
    for title in TITLES:
        iou = {name: float(value) for name, value in zip(SPLIT.classes, rng.random(41), strict=True)}
        pixel, seen, unseen, hiou = rng.random(4).tolist()
        scores[title] = Scores(pixel, seen, unseen, hiou, iou | {"fish": float("nan")})
    history = [
        {"iteration": i, "focal": 1 / i, "ssim": 0.5 / i, "total": 1.5 / i, "learning_rate": 1e-4, "hiou": None}
        for i in range(1, 9)
    ]
    maps = {name: rng.random((128, 128), dtype=np.float32) for name in phrases}
    return demo.Results(5, 12, 8, SPLIT.classes, UNSEEN, tuple(gallery), free, maps, history, scores, seconds=12.3)


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
def html(results: demo.Results) -> str:
    return demo.render_page(results, demo.figures(results), Path("my demo"))


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


def test_every_image_says_what_it_shows(results: demo.Results, page: Page) -> None:
    texts = [image["alt"] for image in page.of("img")]
    assert len(texts) == 1 + 3 * len(results.gallery) + 2 + 3, "hero, scenes, free phrases, charts"
    assert all(text and len(text) > 15 for text in texts) and len(set(texts)) == len(texts)
    truth = results.gallery[0].truth
    assert truth is not None
    label = plots.present(truth)[0]
    named = plots.marked(SPLIT.classes[label], UNSEEN)
    assert any(f"Scene 1, truth: {named} {100 * (truth == label).mean():.0f} %" in str(text) for text in texts)


def test_tables_hold_the_results(results: demo.Results, page: Page) -> None:
    assert page.rows[0] == ["model", "pAcc", "mIoU(S)", "mIoU(U)", "hIoU"]
    markdown = [line.strip("| ").split(" | ") for line in demo.markdown_table(results.scores).splitlines()]
    for i, (title, scores) in enumerate(results.scores.items()):
        figures = [scores.pixel_accuracy, scores.miou_seen, scores.miou_unseen, scores.hiou]
        expected = [title, *(f"{100 * figure:.1f}" for figure in figures)]
        assert page.rows[i + 1] == expected == markdown[i + 2]


def test_missing_figures_show_as_a_dash() -> None:
    nothing = Scores(0.5, float("nan"), 0.25, float("nan"), {})
    assert demo.markdown_table({"m": nothing}).endswith("| m | 50.0 | – | 25.0 | – |")


def test_page_says_how_little_its_figures_mean_and_where_better_ones_are(page: Page) -> None:
    text = " ".join(page.text.split())
    assert "12 scenes (seed 5)" in text and "chance" in text and "data/README.md" in text
    assert "8 steps of 16 pictures" in text and "31 seen classes only" in text


def test_commands_name_the_picture_and_another_seed(page: Page) -> None:
    assert "sptseg segment 'my demo/picture.png' --classes" in page.text and "--seed 6 " in page.text


def test_accuracy_leaves_ignored_pixels_out() -> None:
    truth = np.array([[0, 1], [255, 255]])
    plate = demo.Plate(
        "p", np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), int), truth, ("a", "b"), ((0, 0, 0),) * 2, ()
    )
    assert plate.accuracy == 0.5


def test_names_are_escaped() -> None:
    names = ("<b>&", "b")
    plate = demo.Plate(
        "<i>", np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), int), None, names, ((9, 9, 9),) * 2, names
    )
    html = demo.html_plate(plate)
    assert "<b>" not in html and "<i>" not in html and "&lt;b&gt;&amp;*" in html


def test_free_phrases_are_in_the_tiny_clips_vocabulary_and_true_of_the_scene() -> None:
    assert {word for phrase in demo.FREE_CLASSES for word in phrase.split()} <= set(scenes.WORDS)
    _, label = scenes.draw(demo.FREE_SEED)
    in_view = set(SPLIT.names(np.unique(label).tolist()))
    nouns = {name for name in SPLIT.classes for phrase in demo.FREE_CLASSES if phrase.endswith(f" {name}")}
    assert nouns - in_view == {"castle"} and in_view <= nouns


def test_save_writes_the_folder(results: demo.Results, tmp_path: Path) -> None:
    page = demo.save(results, tmp_path)
    assert page == tmp_path / "index.html" and "</html>" in page.read_text(encoding="utf-8")
    names = {"scene-1", "scene-2", "free-phrases", "picture", "class-iou", "scores", "training"}
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert pictures == names
    numbers = json.loads((tmp_path / "results.json").read_text())
    assert numbers["seed"] == 5 and numbers["scores"][demo.TRAINED]["iou"]["fish"] is None
    assert numbers["history"] == list(results.history)
    assert (tmp_path / "table.md").read_text(encoding="utf-8").startswith(demo.markdown_table(results.scores))


@pytest.mark.parametrize("wrong", [{"scenes": 0}, {"iterations": -1}])
def test_senseless_sizes_are_refused_before_anything_is_written(wrong: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wanted at least 1"):
        demo.demo(tmp_path / "demo", **wrong)  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = demo.demo(tmp_path / "demo", seed=3, scenes=8, iterations=4)
    assert page.as_uri() in capsys.readouterr().out
    numbers = json.loads((page.parent / "results.json").read_text())
    assert tuple(numbers["scores"]) == TITLES and len(numbers["history"]) == 4
    assert all(0 < scores["pixel_accuracy"] < 1 for scores in numbers["scores"].values())
    Page(page.read_text(encoding="utf-8"))
