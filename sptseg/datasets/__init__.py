"""Pictures with labels and names: read, augmented, checked, shown."""

# fmt: off
from sptseg.datasets import plots, splits, transforms
from sptseg.datasets.check import (
    DataReport, Panel, SHOWN, check_dataset, contact_sheet, listed, sheet, shrunk, spread, survey,
)
from sptseg.datasets.folders import (
    ImageMaskFolder, Sample, Scenes, ade20k, camvid, coco_stuff, context, folder_split, voc2012,
)
from sptseg.datasets.images import Unreadable, as_array, enlarge, luminance, open_image, png, sorted_images
from sptseg.datasets.loading import read_batches
from sptseg.datasets.named import Data, SCENES_TO_SCORE, SCENES_TO_TRAIN
from sptseg.datasets.plots import (
    BLUE, DOT, FAINT, GREEN, INK, LEGEND, MARK, MARKERS, ORANGE, OUTLINED, Plot, UNSEEN_NOTE, VERMILION, colourise,
    legend, marked, overlay, png_bytes, save_figure, show_image, tidy, write_names,
)
from sptseg.datasets.splits import Colour, IGNORE, Split, names, scenes, spread_palette
from sptseg.datasets.transforms import (
    Augmentation, CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, test_transform, train_transform,
)
