"""Pictures with labels and names: read, augmented, checked, shown."""

# fmt: off
from sptseg.datasets import plots, splits, transforms
from sptseg.datasets.check import DataReport, MOST_LISTED, check_dataset, evenly, show_samples, survey
from sptseg.datasets.folders import (
    Corrupted, ImageMaskFiles, ImageMaskFolder, Pool, STRENGTHS, Sample, Scenes, corrupt, folder_split,
)
from sptseg.datasets.images import (
    Note, Unreadable, as_array, enlarge, listed, luminance, open_image, png, reduce, sorted_images,
)
from sptseg.datasets.layouts import (
    Data, SCENES_TO_SCORE, SCENES_TO_TRAIN, WORDS, ade20k, ade20k_847, camvid, cityscapes, coco_stuff, context, voc2012,
    where,
)
from sptseg.datasets.loading import read_batches
from sptseg.datasets.plots import (
    BLUE, DOT, FAINT, GREEN, INK, LEGEND, MARK, MARKERS, ORANGE, OUTLINED, Plot, UNSEEN_NOTE, VERMILION, colourise,
    legend, marked, overlay, png_bytes, save_figure, show_image, tidy, write_names,
)
from sptseg.datasets.splits import (
    BACKGROUND, Colour, FACTS, IGNORE, Split, ignored_label, names, plain, scenes, spread_palette,
)
from sptseg.datasets.transforms import (
    Augmentation, CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, test_transform, train_transform,
)
