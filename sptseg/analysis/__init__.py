"""Why it works and where it fails, as arrays, tables and figures."""

# fmt: off
from sptseg.analysis import charts, failures, spectra
from sptseg.analysis.charts import class_iou_bars, training_curves
from sptseg.analysis.failures import KINDS, Predictions, error_counts, error_map, error_shares, worst_pictures
from sptseg.analysis.spectra import (
    filter_picture, filter_response, prompt_states, radial_power, spectral_prompt_of, spectral_summary,
)
