"""A real browser moves the sliders, in JupyterLab and in the app of `sptseg explore`; pictures and masks must follow.

How soon they do is held against what this machine needs for the model alone. Screenshots are kept in `artefacts/`, or
in the folder that SPTSEG_ARTEFACTS names.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

import nbformat
import pytest
import torch
from playwright.sync_api import Locator, Page, expect, sync_playwright

import sptseg
from sptseg.datasets import enlarge
from sptseg.system import write

pytestmark = pytest.mark.browser

SECONDS = 240  # for anything to happen, on a busy machine
ROOT = Path(__file__).parents[2]
ARTEFACTS = Path(os.environ.get("SPTSEG_ARTEFACTS", ROOT / "artefacts"))
LIMITS = {"filter": 100, "masks": 500}  # milliseconds from a key to new pixels, where SEGMENTS is the model's own time
SEGMENTS = 70  # milliseconds: what `segment` takes of one core of a server where nothing else runs
WATCH = """([root, names]) => {
    let start, left = new Set();
    root.addEventListener("keydown", () => {
        start = performance.now(); left = new Set(names); window.answers = {};
    }, true);
    for (const name of names) {
        const image = root.querySelector(`.panel-${name} img`);
        new MutationObserver(async () => {
            await image.decode();
            if (left.delete(name)) window.answers[name] = performance.now() - start;
        }).observe(image, {attributeFilter: ["src"]});
    }
}"""
LAB_SETTINGS = {  # no question about news; cells off screen are drawn too
    "page_config": {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}},
    "default_setting_overrides": {"@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"}},
}
PACKAGES = ("chromium", "fonts-dejavu-core")
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking".split()
WIDGETS = {
    "FrequencyExplorer": "FrequencyExplorer(model, image, split.classes, label, split.names(split.unseen))",
    "FilterExplorer": "FilterExplorer(model, image)",
    "BranchExplorer": "BranchExplorer(model, image, split.classes, label)",
    "LossExplorer": "LossExplorer(image, sptseg.segment(model, image, split.classes).scores('sand'), label == 3)",
    "PromptPlayground": "PromptPlayground(model, image, ['sky', 'wooden fence', 'a blue house', 'flower'])",
    "FailureBrowser": "FailureBrowser(collect(model, sptseg.datasets.Scenes(6, seed=3), split))",
}
SETUP = """
import sptseg
from sptseg.analysis.failures import collect
from sptseg.interactive import BranchExplorer, FailureBrowser, FilterExplorer, FrequencyExplorer
from sptseg.interactive import LossExplorer, PromptPlayground
model, split = sptseg.load_model(), sptseg.splits.scenes()
image, label = sptseg.scenes.draw(7)
"""


@contextmanager
def running(command: list[str], cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """A server in a process group of its own, ended with all that it started, whatever happens."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTER")}  # no other's kernels
    env |= {"OMP_NUM_THREADS": "1", "JUPYTER_CONFIG_DIR": str(cwd / "config"), "TMPDIR": str(cwd)}
    options = {"cwd": cwd, "env": env, "text": True, "start_new_session": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options) as process:
        try:
            yield process
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=SECONDS / 4)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answer(url: str, timeout: float = SECONDS) -> int:
    """The server's status, after redirections; 0 if nothing answers."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as found:
            return 401 if "/login" in found.url else found.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """Of Debian's Chromium, installed if that is possible."""
    if shutil.which("chromium") is None and shutil.which("apt-get") and os.geteuid() == 0:
        subprocess.run(["apt-get", "update", "-q"], check=False)
        subprocess.run(["apt-get", "install", "-qy", "--no-install-recommends", *PACKAGES], check=False)
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip(f"there is no chromium; on Debian: apt-get install --no-install-recommends {' '.join(PACKAGES)}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=QUIET)
        page = browser.new_page(viewport={"width": 1300, "height": 1600})
        page.set_default_timeout(1000 * SECONDS)
        expect.set_options(timeout=1000 * SECONDS)
        yield page
        browser.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """JupyterLab's address and the folder that it serves."""
    folder, port = tmp_path_factory.mktemp("lab"), free_port()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}"]
    for name, content in LAB_SETTINGS.items():
        write(folder / "config" / "labconfig" / f"{name}.json", json.dumps(content))
    with running(command, folder):
        wait_until(lambda: answer(f"http://127.0.0.1:{port}/api", 5) == 200, "JupyterLab does not answer")
        yield f"http://127.0.0.1:{port}", folder


def wait_until(done: Callable[[], bool], complaint: str) -> None:
    end = time.monotonic() + SECONDS
    while not done():
        if time.monotonic() > end:
            pytest.fail(complaint)
        time.sleep(0.1)


def run_all(page: Page, lab: tuple[str, Path], notebook: nbformat.NotebookNode, name: str) -> None:
    """Opens a notebook in JupyterLab and has all its cells run."""
    address, folder = lab
    nbformat.write(notebook, folder / name)
    page.goto(f"{address}/doc/tree/{name}?reset")
    expect(page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]')).to_be_attached()
    not_run = page.locator(".jp-CodeCell .jp-InputPrompt").filter(has_text="[ ]:")

    def run() -> bool:  # again if the kernel was not connected yet: JupyterLab forgets the request
        page.get_by_text("Run", exact=True).first.click()
        page.locator('[data-command="runmenu:run-all"]').click()
        with suppress(AssertionError):
            expect(not_run).to_have_count(0, timeout=4000)
        return not not_run.count()

    wait_until(run, "JupyterLab does not run the cells")


def pixels(picture: Locator) -> bytes:
    """An image widget's file: its address changes even if that does not."""
    code = "async e => Array.from(new Uint8Array(await (await fetch(e.src)).arrayBuffer()))"
    return bytes(picture.evaluate(code))


def slide(page: Page, explorer: Locator) -> None:
    """Moves the frequency explorer's slider by mouse and by keyboard; pictures and masks must follow."""
    pictures = [explorer.locator(f".panel-{name} img") for name in ("spectrum", "after", "masks-after")]
    for picture in pictures:
        expect(picture).to_be_visible()
    states = [[pixels(picture) for picture in pictures]]

    def all_changed() -> bool:
        now = [pixels(picture) for picture in pictures]
        done = all(new != old for new, old in zip(now, states[-1], strict=True))
        states.extend([now] * done)
        return done

    track = explorer.locator(".noUi-base").first
    explorer.locator(".noUi-handle-upper").hover()
    page.mouse.down()
    track.hover(position={"x": 0.6 * track.evaluate("e => e.clientWidth"), "y": 0}, force=True)
    page.mouse.up()
    wait_until(all_changed, "the mouse moves the slider and not all pictures")
    explorer.locator(".noUi-handle-lower").first.focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    wait_until(all_changed, "the keys move the slider and not all pictures")
    assert len({masks for *_, masks in states}) == 3


def answers(page: Page) -> dict[str, tuple[float, float]]:
    """Milliseconds from a key to new pixels, medians of eight, and those allowed: more where this machine is slower."""
    found, scene = {}, enlarge(sptseg.scenes.draw(7)[0], 3)
    model, classes = sptseg.load_model(), sptseg.splits.scenes().classes
    torch.set_num_threads(1)
    page.locator(".FrequencyExplorer select").first.select_option("tokens before block 1")
    for name, slider, fast in (("FrequencyExplorer", 1, "after"), ("FilterExplorer", 2, "added-by-prompt")):
        if name == "FilterExplorer":
            page.get_by_role("tab", name="Learned filter").click()
        widget = page.locator(f".{name}")
        handle = widget.locator(".noUi-handle-lower").nth(slider)
        handle.scroll_into_view_if_needed()
        page.evaluate(WATCH, [widget.element_handle(), [fast, "masks-after"]])
        page.wait_for_timeout(2000)  # until the last change is shown
        times, own = [], []
        for i in range(8):
            start = time.perf_counter()
            sptseg.segment(model, scene, classes)
            own.append(1000 * (time.perf_counter() - start))
            handle.focus()
            page.keyboard.press("Home" if i % 2 else "End")  # far enough for other masks; at last back
            wait_until(lambda: len(page.evaluate("window.answers")) == 2, f"{name}: no answer")
            times.append(page.evaluate("window.answers"))
        slower = max(1, median(own) / SEGMENTS)
        for kind, panel in (("filter", fast), ("masks", "masks-after")):
            found[f"{name}, {kind}"] = median(each[panel] for each in times), LIMITS[kind] * slower
    return found


def test_every_widget_shows_its_pictures_and_the_slider_moves_them(page: Page, lab: tuple[str, Path]) -> None:
    cells = [nbformat.v4.new_code_cell(source) for source in (SETUP, *WIDGETS.values())]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    run_all(page, lab, nbformat.v4.new_notebook(cells=cells, metadata=kernel), "widgets.ipynb")
    for name in WIDGETS:
        widget = page.locator(f".{name}")
        expect(widget.locator("img").first).to_be_visible()
        expect(widget.get_by_text("javascript error")).to_have_count(0)
        pictures = widget.locator("img").all()
        widths = [picture.evaluate("e => e.decode().then(() => e.naturalWidth)") for picture in pictures]
        assert len(widths) >= 3 and min(widths) > 100
        widget.screenshot(path=ARTEFACTS / f"{name}.png")
    slide(page, page.locator(".FrequencyExplorer"))
    assert not page.locator('[data-mime-type="application/vnd.jupyter.error"]').count()


def test_the_app_serves_the_explorer_and_nothing_else(page: Page, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sptseg.cli", "explore", "--no-browser", "--port", str(free_port())]
    with running(command, tmp_path) as process:
        assert process.stdout is not None
        said = iter(process.stdout.readline, "")  # up to the address, or the end
        url = next((word for line in said for word in line.split() if "token=" in word), None)
        assert url is not None, "the app ended without an address"
        page.goto(url)
        slide(page, page.locator(".FrequencyExplorer"))
        for width in (1280, 1920):
            page.set_viewport_size({"width": width, "height": 1000})
            page.wait_for_timeout(1000)
            page.screenshot(path=ARTEFACTS / f"explore-{width}.png", full_page=True)
            shown = page.locator(".FrequencyExplorer img, .FrequencyExplorer table").all()
            places = [each.bounding_box() for each in shown]
            right = max(place["x"] + place["width"] for place in places if place is not None)
            assert 0.85 * width < right <= width and page.evaluate("document.body.scrollWidth") <= width
        found = answers(page)
        write(ARTEFACTS / "answers.json", json.dumps(found, indent=1))
        assert all(answered <= allowed for answered, allowed in found.values()), found
        assert "load_model" not in page.content() and "sptseg.explore" not in page.content()
        address, token = url.split("?")
        assert answer(address) == 401
        for path in ("voila/files/explore.ipynb", "voila/files/open.html", "voila/tree", "api/contents", "lab"):
            assert answer(f"{address}{path}?{token}") in (403, 404), path
        assert len(list(tmp_path.glob("sptseg-explore-*"))) == 1
    assert process.returncode == 0 and not list(tmp_path.glob("sptseg-explore-*"))
