"""The app: what is refused before it starts, and how its server is set up; `test_browser.py` visits it."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from voila.app import Voila

from sptseg import scenes
from sptseg.cli.commands import main
from sptseg.datasets import images, splits
from sptseg.interactive import app as module


def test_the_server_is_for_this_computer_and_notebook_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apps: list[tuple[Any, Any]] = []

    def start(app: Voila) -> None:
        apps.append((app, nbformat.read(app.notebook_path, as_version=4)))
        raise OSError("no more sockets")

    monkeypatch.setattr(Voila, "start", start)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "voila.json").write_text('{"Voila": {"ip": "0.0.0.0", "token": ""}}')
    with pytest.raises(OSError, match="no more sockets"):
        module.explore(port=0, browser=False)
    ((app, notebook),) = apps
    assert app.ip == "127.0.0.1" and len(app.token) >= 32
    assert app.voila_configuration.file_allowlist == [] and app.voila_configuration.strip_sources
    assert app.config.MappingKernelManager.cull_idle_timeout > 0
    assert "'self'" in app.tornado_settings["headers"]["Content-Security-Policy"]
    assert notebook.cells[1].source.endswith("explorer((), 'embedded', '', 7)")
    assert not Path(app.notebook_path).parent.exists(), "removed, though the server failed"


def test_bad_arguments_end_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        cases = [
            (["--port", port], f"port {port} cannot be used"),
            ([str(tmp_path / "none.png")], "none.png"),
            (["--classes", "tree,zebra"], "does not know 'zebra'"),
        ]
        for arguments, sentence in cases:
            with pytest.raises(SystemExit) as stopped:
                main(["explore", "--no-browser", *arguments])
            said = capsys.readouterr().err
            assert stopped.value.code == 2 and sentence in said and len(said.splitlines()) == 1


def test_the_page_has_a_tab_for_each_part_of_the_model_and_pictures_to_choose_from(tmp_path: Path) -> None:
    tabs = module.explorer((), "embedded", "", 7)
    assert tabs.titles == ("Frequencies", "Learned filter", "Branches")
    frequencies = tabs.children[0]
    assert len({id(tab.whole) for tab in tabs.children}) == 1, "segmented once for all"
    assert frequencies.classes == splits.scenes().classes and len(frequencies.pictures) == module.DRAWN
    np.testing.assert_array_equal(frequencies.label, images.enlarge(scenes.draw(7)[1], 3))
    (tmp_path / "picture.png").write_bytes(images.png(scenes.draw(3)[0]))
    (given,) = module.explorer((str(tmp_path / "picture.png"),), "embedded-zegclip", "tree, sky", 7).children
    assert given.classes == ("tree", "sky") and given.labels == [None] * (1 + module.DRAWN)
    np.testing.assert_array_equal(given.picture, scenes.draw(3)[0])
