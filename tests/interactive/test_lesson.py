"""What the notebooks' cells share."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle
from PIL import Image
from toys import toy_model

from sptseg.datasets.plots import Plot
from sptseg.interactive import lesson


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is displayed, as it is displayed."""
    displayed: list[Any] = []
    monkeypatch.setattr(lesson, "display", displayed.append)
    return displayed


@pytest.mark.parametrize(
    ("answer", "right", "verdict"),
    [
        (..., 3, "Not yet"), ([None, 2], [1, 2], "Not yet"), (3.01, 3, "Right"), (3.1, 3, "Not quite"),
        (0, -0.0, "Right"), (torch.tensor([1, 2]), [1.0, 2.0], "Right"), ([1, 2, 3], [1, 2], "Not quite"),
        ("tree", "tree", "Right"), ("car", "tree", "Not quite"), ("three", 3, "Not quite"), (65, 64, "Not quite"),
        (87.5, 87.4929, "Right"), (1.44e-5, 1.4425e-5, "Right"), (None, 3, "Not yet"),
    ],
)  # fmt: skip
def test_answers_are_held_to_their_seal_or_to_what_is_computed(
    shown: list[Any], answer: Any, right: Any, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(lesson.ANSWERS, "the same", lambda given: given)
    lesson.check(answer, lesson.seal(right), "Count again.")
    lesson.check(answer, "the same", "Count again.", right)
    for text in shown:
        assert verdict in text.data and ("Count again." in text.data) == (verdict == "Not quite")
    assert len(shown) == 2


def test_metrics_are_written_and_shown(shown: list[Any], tmp_path: Path) -> None:
    lesson.write_metrics(tmp_path / "new", {"hiou": np.float32(0.75), "pictures": 3})
    assert json.loads((tmp_path / "new" / "metrics.json").read_text()) == {"hiou": 0.75, "pictures": 3.0}
    assert "| hiou | 0.75 |" in shown[0].data
    with pytest.raises(ValueError, match="the metric slope is nan"):
        lesson.write_metrics(tmp_path, {"slope": float("nan")})


def test_a_figure_has_its_sentence_beside_it_and_keeps_the_colours_of_a_legend(shown: list[Any]) -> None:
    figure, colours = Plot(4, 4), [(0, 158, 115), (240, 228, 66), (0, 114, 178)]
    figure.set_layout_engine("none")
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    figure.add_axes((0, 0.1, 1, 0.9)).imshow(noise)
    for i, colour in enumerate(colours):
        figure.add_artist(Rectangle((0.1 * i, 0), 0.04, 0.03, color=np.array(colour) / 255))
    lesson.show(figure, "Noise.")
    _, metadata = shown[0]._repr_mimebundle_()
    assert metadata["image/png"] == {"alt": "Noise.", "width": 4 * 96} and shown[1].data == "*Noise.*"
    picture = np.asarray(Image.open(io.BytesIO(shown[0].data)).convert("RGB")).astype(int)
    assert len(picture) == 4 * lesson.DPI
    assert np.abs(picture[-7, 12:184:58] - colours).max() < 12


def test_the_model_is_drawn_with_the_shapes_of_its_own_tensors() -> None:
    model = toy_model()
    told = [text.get_text() for text in lesson.model_picture(model, 5, "Title").axes[0].texts]
    with torch.no_grad():
        patches, image = model.encoder(torch.zeros(1, 3, *model.config.image_size))
        logits = model(torch.zeros(1, 3, *model.config.image_size), torch.randn(5, image.shape[1]))
    for name, tensor in {"patch emb": patches.flatten(2).mT, "image emb": image, "mask logits": logits}.items():
        (found,) = (each for each in told if each.startswith(name))
        assert " × ".join(map(str, tensor.shape[1:])) in found
    with pytest.raises(ValueError, match="lacks prompts, spectral prompts or a decoder"):
        lesson.model_picture(toy_model(spectral_layers=()), 5, "Title")
