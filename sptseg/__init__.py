"""Spectral Prompt Tuning: zero-shot semantic segmentation with a frozen CLIP."""

# fmt: off
import sys

from sptseg import checkpoints, datasets, scenes, training
from sptseg.checkpoints import (
    from_pretrained, import_research_checkpoint, load_model, push_to_hub, save_model, save_pretrained,
)
from sptseg.datasets import splits, transforms
from sptseg.inference import Segmentation, evaluate, metrics, segment
from sptseg.model import (
    DENSE_CLIP, EMBEDDED_CONFIG, SPT_RELEASED, ZEGCLIP, ModelConfig, SptSeg, build_model, clip, read_out,
)
from sptseg.training import TrainConfig, fit, losses

for module in (clip, losses, metrics, splits, transforms):  # `from sptseg.losses import ...` as well
    sys.modules[f"sptseg.{module.__name__.rpartition('.')[2]}"] = module

__version__ = "0.1.0"
__all__ = [
    "DENSE_CLIP", "EMBEDDED_CONFIG", "SPT_RELEASED", "ZEGCLIP", "ModelConfig", "Segmentation", "SptSeg", "TrainConfig",
    "build_model", "checkpoints", "clip", "datasets", "evaluate", "fit", "from_pretrained",
    "import_research_checkpoint", "load_model", "losses", "metrics", "push_to_hub", "read_out", "save_model",
    "save_pretrained", "scenes", "segment", "splits", "training", "transforms",
]
