"""Pictures and class names to mask logits: the whole method."""

# fmt: off
from sptseg.model import clip, decoder, encoder, ops, readouts
from sptseg.model.clip import (
    Clip, EMBEDDED_CLIPS, OLD_FINGERPRINT, TINY, WordTokenizer, about_weights, check_public, data_file, fingerprint,
    load_clip, new_tiny_clip, save_tiny_clip, synonyms,
)
from sptseg.model.config import (
    DENSE_CLIP, EMBEDDED_CONFIG, LossKind, ModelConfig, PROTOCOL_STRIDE, SPT_RELEASED, ZEGCLIP, check_values,
)
from sptseg.model.decoder import HighLowAttention
from sptseg.model.encoder import PromptedEncoder, SpectralPrompt
from sptseg.model.ops import (
    Grid, band_filter, from_windows, grid_to_tokens, interpolation, maps_at_once, resize_positions,
    to_windows, tokens_to_grid,
)
from sptseg.model.readouts import ReadOut, default_readout, read_out
from sptseg.model.spt_seg import SptSeg, build_model, upsample
from sptseg.model.towers import run_block, tower
from sptseg.model.weights import read_weights
