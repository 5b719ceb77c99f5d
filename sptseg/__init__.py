"""Spectral Prompt Tuning: zero-shot semantic segmentation with a frozen CLIP."""

from sptseg import clip, datasets, losses, metrics, scenes, splits, training, transforms
from sptseg.checkpoints import import_research_checkpoint, save_model
from sptseg.hub import from_pretrained, load_model, push_to_hub, save_pretrained
from sptseg.inference import Segmentation, segment
from sptseg.model import DENSE_CLIP, EMBEDDED_CONFIG, SPT_RELEASED, ZEGCLIP, ModelConfig, SptSeg, build_model
from sptseg.readouts import read_out
from sptseg.training import TrainConfig, evaluate, fit

__version__ = "0.1.0"
__all__ = [
    "DENSE_CLIP",
    "EMBEDDED_CONFIG",
    "SPT_RELEASED",
    "ZEGCLIP",
    "ModelConfig",
    "Segmentation",
    "SptSeg",
    "TrainConfig",
    "build_model",
    "clip",
    "datasets",
    "evaluate",
    "fit",
    "from_pretrained",
    "import_research_checkpoint",
    "load_model",
    "losses",
    "metrics",
    "push_to_hub",
    "read_out",
    "save_model",
    "save_pretrained",
    "scenes",
    "segment",
    "splits",
    "training",
    "transforms",
]
