"""The book: every page is there, every link leads somewhere, and nothing comes from elsewhere."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]


class Page(HTMLParser):
    """A page's places, its links, and what a browser loads with it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.places, self.links, self.loaded = {""}, [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.places |= {found.get("id", "")}
        wanted = self.links if tag == "a" else self.loaded
        wanted += [found[name] for name in ("src", "href") if name in found and tag != "use"]


@pytest.mark.slow
def test_links_of_the_book_lead_somewhere_and_it_needs_no_network(tmp_path: Path) -> None:
    for package in ("furo", "myst_nb"):
        pytest.importorskip(package, reason="pip install 'sptseg[book]'")
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "book", "-d", tmp_path / "pages"]
    subprocess.run([*build, ".", tmp_path / "book"], cwd=ROOT, check=True)
    pages = {path: Page(path) for path in (tmp_path / "book").rglob("*.html")}
    assert {path.stem for path in pages} >= {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} | {"index"}
    wrong = []
    for path, page in pages.items():
        wrong += [f"{path.name} loads {link}" for link in page.loaded if urlsplit(link).netloc]
        for link in {*page.links, *page.loaded}:
            parts = urlsplit(link)
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            lost = target in pages and unquote(parts.fragment) not in pages[target].places and parts.fragment
            if not (parts.scheme or parts.netloc) and (lost or not target.is_file()):
                wrong.append(f"{path.name}: {link}")
    assert wrong == []
    assert "naclip" in (tmp_path / "book" / "searchindex.js").read_text()
