"""The drawn world, from a seed, numpy only."""

# fmt: off
from sptseg.scenes import textures
from sptseg.scenes.world import CLASSES, INDEX, Kind, Scene, TEMPLATES, UNSEEN, WORDS, compose, draw
from sptseg.scenes.pen import COLOURS
