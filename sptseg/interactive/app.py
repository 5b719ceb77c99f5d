"""The explorers as an app of its own, in a browser on this computer: `sptseg explore`.

Voila runs one small notebook, written for the occasion into a folder that is removed afterwards. It listens on the
loopback address only, asks for a token, takes no code from the page, and serves nothing else: no sources, no files, no
other notebooks."""

from __future__ import annotations

import secrets
import socket
import tempfile
import webbrowser
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

if TYPE_CHECKING:
    from ipywidgets import Tab
from sptseg import scenes
from sptseg.analysis import spectra
from sptseg.checkpoints import load_model
from sptseg.datasets import as_array, enlarge, names, splits

LOOPBACK = "127.0.0.1"
IDLE = 600  # seconds until the kernel of a page that was closed is ended
# Nothing is fetched from elsewhere: Voila's page asks a CDN for fonts, and works without.
POLICY = "default-src 'self' blob: data: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'"
TITLE = """# Explorers
Change the frequencies of a picture or of its tokens, the learned filter, or the decoder's branches, and see what the
model still finds. Sliders are moved with the mouse, or with the arrow keys."""
DRAWN = 6  # scenes to choose from, besides the pictures given


def explorer(pictures: tuple[str, ...], model: str, classes: str, seed: int) -> Tab:
    """What the page shows, a tab for each explorer that the model has the parts for; arguments as of `explore`."""
    from ipywidgets import Tab  # an optional part

    from sptseg.interactive.masks import BranchExplorer, MaskExplorer
    from sptseg.interactive.widgets import FilterExplorer, FrequencyExplorer

    world, loaded = splits.scenes(), load_model(model)
    drawn = [[enlarge(array, 3) for array in scenes.draw(seed + i)] for i in range(DRAWN)]
    images = [*pictures, *(image for image, _ in drawn)]
    labels = [*[None] * len(pictures), *(None if classes else label for _, label in drawn)]
    given = (loaded, images, names(classes) or world.classes, labels, world.names(world.unseen) if not classes else ())
    has = spectra.parts_of(loaded)
    tabs: dict[str, MaskExplorer] = {"Frequencies": (first := FrequencyExplorer(*given))}
    if "spectral_prompts" in has:
        tabs["Learned filter"] = FilterExplorer(*given, before=first.before)
    if "high" in has:
        tabs["Branches"] = BranchExplorer(*given, before=first.before)
    return Tab(list(tabs.values()), titles=list(tabs))


def explore(
    pictures: tyro.conf.Positional[tuple[str, ...]] = (),
    model: str = "embedded",
    classes: str = "",
    port: int = 8866,
    browser: bool = True,
    seed: int = 7,
) -> None:
    """Serves explorers as an app in the browser, to this computer only, until Ctrl-C.

    The frequencies of pictures and of the model's tokens, its learned filter and its decoder's branches are changed by
    hand, and masks and scores follow.

    Args:
        pictures: image files to choose from, before six drawn scenes, whose IoU per class is shown.
        model: as for `sptseg evaluate`.
        classes: names, comma-separated; by default those of the drawn scenes.
        port: where to listen.
        browser: open a browser window; else only the address is printed.
        seed: of the first drawn scene."""
    if find_spec("voila") is None or find_spec("ipywidgets") is None:
        raise ValueError("the explorer needs Voila and ipywidgets; install them with: pip install 'sptseg[notebooks]'")
    pictures = tuple(str(Path(picture).resolve()) for picture in pictures)
    for picture in pictures:
        as_array(picture)
    model = str(Path(model).resolve()) if Path(model).exists() else model
    load_model(model).class_embeddings(names(classes) or splits.scenes().classes)
    with socket.socket() as probe:
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise ValueError(f"port {port} cannot be used ({error.strerror}); give another one with --port") from error
    with tempfile.TemporaryDirectory(prefix="sptseg-explore-") as folder:
        _serve(Path(folder), f"explorer({pictures!r}, {model!r}, {classes!r}, {seed})", port, browser)


def _serve(folder: Path, call: str, port: int, browser: bool) -> None:
    """Runs Voila on a notebook of one cell, in this process."""
    import nbformat
    from traitlets.config import Config
    from voila.app import Voila

    token = secrets.token_urlsafe(24)
    url = f"http://{LOOPBACK}:{port}/?token={token}"

    class App(Voila):
        def launch_browser(self) -> None:  # called when the server listens
            print(f"The explorer is at {url}\nCtrl-C ends it.", flush=True)
            if browser:  # through a file, so that the token is on no command line
                page = folder / "open.html"
                page.write_text(f'<meta http-equiv="refresh" content="0;url={url}">')
                webbrowser.open(page.as_uri())

    cell = nbformat.v4.new_code_cell(f"from sptseg.interactive.app import explorer\n{call}")
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    content = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(TITLE), cell], metadata=kernel)
    notebook = folder / "explore.ipynb"
    nbformat.write(content, notebook)
    config = {
        "Voila": {
            "ip": LOOPBACK, "port": port, "port_retries": 0, "token": token, "connection_dir_root": str(folder),
            "tornado_settings": {"headers": {"Content-Security-Policy": POLICY}},
        },
        "VoilaConfiguration": {"strip_sources": True, "file_allowlist": [], "allow_template_override": "NO"},
        "MappingKernelManager": {"cull_idle_timeout": IDLE, "cull_interval": IDLE // 10},
        "KernelSpecManager": {"kernel_dirs": []},  # no kernel but this interpreter's
    }  # fmt: skip
    app = App(config=Config(config), config_file_paths=[], log_level="ERROR")  # whatever is configured elsewhere
    app.initialize([str(notebook)])
    app.start()
