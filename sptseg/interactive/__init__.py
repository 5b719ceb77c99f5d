"""What one steps through and moves: the widgets, which load when they are asked for, as ipywidgets is optional."""

# fmt: off
from importlib import import_module
from typing import Any

from sptseg.interactive import notebooks
from sptseg.interactive.app import explore

MODULES = {
    "parts": ("named_overlay",), "playground": ("FailureBrowser", "LossExplorer", "PromptPlayground"),
    "widgets": ("FilterExplorer", "FrequencyExplorer"), "masks": ("BranchExplorer",),
}
WIDGETS = {name: module for module, names in MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in WIDGETS:
        raise AttributeError(f"sptseg.interactive has no {name}")
    return getattr(import_module(f"sptseg.interactive.{WIDGETS[name]}"), name)
