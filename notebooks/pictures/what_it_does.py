"""Draws what_it_does.png, the README's first picture: python notebooks/pictures/what_it_does.py"""

from pathlib import Path

import sptseg
from sptseg.datasets import plots, scenes

SCENE = 6101  # one on which the embedded model does well: 96 % of the pixels are right, 93 % of all scenes'
ASKED = (
    (["road", "wheat field", "cloud", "castle", "fish"], None),
    (["castle", "fish"], "usual"),
    (["cloud"], "usual"),
)

image, _ = sptseg.scenes.draw(SCENE)
model, split = sptseg.load_model(), scenes()
figure = plots.Plot(9.6, 3.0)
axes = figure.subplots(1, 1 + len(ASKED))
plots.show_image(axes[0], image, "a picture")
for ax, (names, background) in zip(axes[1:], ASKED, strict=True):
    found = sptseg.segment(model, image, names, background=background)
    plots.show_image(ax, found.overlay(), ", ".join(names) if background else "all five names")
    plots.write_names(ax, found.labels, names, split.names(split.unseen))
figure.supxlabel(f"{plots.UNSEEN_NOTE}; what is pale is none of the names above it", fontsize=9, color=plots.INK)
plots.save_figure(figure, Path(__file__).with_suffix(".png"), dpi=144)
