"""What one steps through and moves."""

# fmt: off
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sptseg.interactive import notebooks
from sptseg.interactive.app import explore

if TYPE_CHECKING:
    from sptseg.interactive import lesson
    from sptseg.interactive.failure_browser import FailureBrowser
    from sptseg.interactive.panels import named_overlay
    from sptseg.interactive.widgets import FilterExplorer, FrequencyExplorer, PromptPlayground

WIDGETS = {"FailureBrowser": "failure_browser", "named_overlay": "panels", "FilterExplorer": "widgets",
           "FrequencyExplorer": "widgets", "PromptPlayground": "widgets"}


def __getattr__(name: str) -> Any:
    """The widgets, when they are asked for: ipywidgets is an optional part."""
    if name not in WIDGETS:
        raise AttributeError(f"sptseg.interactive has no {name}")
    return getattr(import_module(f"sptseg.interactive.{WIDGETS[name]}"), name)
