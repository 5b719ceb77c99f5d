"""The model that a command works with, as it is named on the command line."""

from dataclasses import dataclass, replace
from typing import Any

from sptseg.checkpoints import EMBEDDED, load_model
from sptseg.cli.train import clip_weights
from sptseg.inference import Precision, at_precision, fitted
from sptseg.model import DENSE_CLIP, SPT_RELEASED, TINY, SptSeg, build_model, default_readout, load_clip
from sptseg.training import training_free

TRAINING_FREE = "training-free"
UNTRAINED = {"dense-clip": DENSE_CLIP, "untrained": SPT_RELEASED}


@dataclass(frozen=True)
class Which:
    """Which model.

    Attributes:
        model: "embedded" (SPT-SEG on the tiny CLIP, or with `clip` on tiny-plain), "embedded-zegclip", there also
            "embedded-released", "dense-clip" (no training), "training-free"
            (the same as the read-outs' papers evaluate it: 80 templates, windows of 224), "untrained" (SPT-SEG with
            random prompts and decoder, to try sizes), or a checkpoint's path. Default: "embedded", or "dense-clip" if
            `clip` is given.
        clip: for all but the embedded ones: "tiny", "tiny-plain" (trained by picture and caption alone) or an
            open_clip model, such as ViT-B-16-quickgelu; for a checkpoint only if its CLIP's weights are a file.
        clip_weights: its weights: an open_clip tag such as openai (downloaded once), a file, or "none" for random ones.
        readout: without a trained model, how CLIP's last block is read: plain, maskclip, sclip, clearclip, naclip or
            gem (sptseg.read_out says what they are). Default: for "untrained" plain; else naclip, which has the highest
            mean over seven data sets in the papers' own tables; plain for the tiny CLIP, whose patches were trained.
        precision: the type of its weights: "bf16" and "fp16" are faster where the hardware has them, "no" is float32.
    """

    model: str = ""
    clip: str = ""
    clip_weights: str = ""
    readout: str = ""
    precision: Precision = "no"

    def load(self, layout: str = "") -> SptSeg:
        """The model; the usual recipe differs between data sets, told by their layout."""
        return at_precision(self.in_float32(layout), self.precision)

    def in_float32(self, layout: str) -> SptSeg:
        name = self.model or ("dense-clip" if self.clip else "embedded")
        if self.clip_weights and not self.clip:
            raise ValueError(f"--clip-weights {self.clip_weights} needs --clip, such as ViT-B-16-quickgelu")
        if name in (*UNTRAINED, TRAINING_FREE):
            clip, weights = self.clip or TINY, clip_weights(self.clip or TINY, self.clip_weights)
            readout: Any = self.readout or ("plain" if name == "untrained" else default_readout(clip))
            if name == TRAINING_FREE:
                return build_model(training_free(clip, weights, readout, layout)).eval()
            loaded = load_clip(clip, weights)
            config = replace(UNTRAINED[name], readout=readout, clip_weights=weights)
            return build_model(fitted(config, loaded), loaded).eval()
        if self.readout:
            told = f"--readout {self.readout} goes with --model dense-clip, training-free or untrained"
            raise ValueError(f"{told}; {name} has the one that it was trained with")
        if not self.clip:
            return load_model(name)
        if self.clip == "tiny-plain" and (own := name.replace("embedded", "embedded-plain")) in EMBEDDED:
            return load_model(own)
        if name in EMBEDDED:
            raise ValueError(f"model {name} has its own CLIP: leave out --clip, or take dense-clip or training-free")
        return load_model(name, load_clip(self.clip, clip_weights(self.clip, self.clip_weights)))
