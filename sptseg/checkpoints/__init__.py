"""Trained parts in and out; nothing executed, nothing half-written."""

# fmt: off
from sptseg.checkpoints.checkpoint import (
    EMBEDDED, completed, from_pretrained, load_model, push_to_hub, save_model, save_pretrained, with_tuples,
)
from sptseg.checkpoints.research import IMPORTED, import_report, import_research_checkpoint
