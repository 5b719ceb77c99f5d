"""Any picture to masks, any data set to scores."""

# fmt: off
from sptseg.inference import evaluation, metrics
from sptseg.inference.evaluation import (
    by_training, confusion_matrices, evaluate, first_indices, new_accelerator, predictions,
)
from sptseg.inference.metrics import (
    Change, FIGURES, SUMMARY, Scores, SegmentationMetrics, check_labels, confusion_matrix, iou_change, iou_per_class,
    percent, ratios_of_tallies, score_interval, scores, table, tallies,
)
from sptseg.inference.segmentation import CocoMasks, Segmentation, segment
from sptseg.inference.windows import (
    Precision, WindowLogits, at_precision, augmentation, fitted, pad_to_patches, window_logits, window_starts,
    windows_of,
)
