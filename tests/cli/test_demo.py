"""The demonstration's page shows what was computed, and stands on its own."""

import json
import re
from pathlib import Path
from xml.etree.ElementTree import Element, fromstring

import pytest

from sptseg import scenes
from sptseg.cli import demo
from sptseg.datasets import plots, splits
from sptseg.inference import Scores


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run on two scenes and with two small steps leaves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "BATCH", 2)
        return demo.demo(tmp_path_factory.mktemp("the") / "my demo", seed=5, scenes=2, iterations=2).parent


@pytest.fixture(scope="module")
def page(folder: Path) -> Element:
    """The page's tags, each closed in its turn."""
    return fromstring((folder / "index.html").read_text(encoding="utf-8"))


def test_the_page_is_semantic_and_asks_for_nothing_over_the_network(folder: Path, page: Element) -> None:
    addresses = [tag.attrib[name] for tag in page.iter() for name in ("src", "href") if name in tag.attrib]
    assert addresses and all(address.startswith("data:image/png;base64,") for address in addresses)
    assert not {"script", "link", "iframe", "object", "form"} & {tag.tag for tag in page.iter()}
    html = re.sub(r"base64,[^\"]*", "", (folder / "index.html").read_text(encoding="utf-8"))
    assert not re.search(r"https?:|@import|url\(|//[a-z]", html)
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
    split = splits.scenes()
    named = plots.marked(split.classes[label], split.names(split.unseen))
    assert any(f"Scene 1, truth: {named} {100 * (truth == label).mean():.0f} %" in text for text in texts)


def test_figures_agree_and_the_page_says_how_little_they_mean_and_what_to_do_next(folder: Path, page: Element) -> None:
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
    assert Scores(0.5, float("nan"), 0.25, float("nan"), {}).cells() == ["50.0", "–", "25.0", "–"]
    escaped = demo.Picture(b"", '"<b>', "<i>&").html()
    assert escaped.endswith('alt="&quot;&lt;b&gt;"/><figcaption>&lt;i&gt;&amp;</figcaption></figure>')
    text = " ".join(" ".join(map(str, page.itertext())).split())
    assert "2 scenes (seed 5)" in text and "chance" in text and "data/README.md" in text
    assert "2 steps of 2 pictures" in text and "31 seen classes only" in text
    assert f"sptseg segment '{folder}/picture.png' --classes" in text and "--seed 6 " in text
