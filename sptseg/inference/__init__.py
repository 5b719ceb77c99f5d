"""Any picture to masks, any data set to scores."""

# fmt: off
from sptseg.inference import evaluation, metrics
from sptseg.inference.evaluation import by_training, evaluate, first_indices, new_accelerator, predictions, summary
from sptseg.inference.metrics import SUMMARY, Scores, SegmentationMetrics, bootstrap, confusion, iou_per_class, scores
from sptseg.inference.segmentation import Segmentation, read_ahead, segment
from sptseg.inference.windows import (
    Precision, WindowLogits, at_precision, augmentation, pad_to_patches, window_logits, window_starts, windows_of,
)
