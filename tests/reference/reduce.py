"""Makes the reduced reference sets beside this file: python reduce.py SOURCE TARGET

Of what is large, the first image only; of its scores, every second pixel; labels in the smallest type that holds them.
Of the read-outs, the last two blocks only, with the tokens that enter them.
"""

import ast
import sys
from typing import Any

import torch
from open_clip.model import _build_vision_tower
from safetensors import safe_open
from safetensors.torch import save_file

FIRST_ONLY = ("output/encoder_layer_", "output/patch_embedding", "output/decoder_", "output/scores", "tokens.", "image")
KEPT_BLOCKS = 2
NOT_NEEDED = ("images", "tokens.gem", "visual.conv1.weight", "visual.positional_embedding")  # gem reads six blocks


def reduced(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name.startswith(("train/label", "selftrain/label")):
        return tensor.to(torch.int16 if tensor.min() < 0 else torch.uint8)
    if name == "output/scores":
        tensor = tensor[..., ::2, ::2]
    return tensor[:1].contiguous() if name.startswith(FIRST_ONLY) and "gaussian" not in name else tensor


@torch.no_grad()
def last_blocks(tensors: dict[str, torch.Tensor], config: dict) -> dict[str, torch.Tensor]:
    """The same read-outs of a tower of two blocks, and `input`: the tokens that enter it, by open_clip's own code."""
    visual: Any = _build_vision_tower(tensors["visual.proj"].shape[1], config, True).eval()
    visual.load_state_dict({k.removeprefix("visual."): v for k, v in tensors.items() if k.startswith("visual.")})
    seen = []
    first = config["layers"] - KEPT_BLOCKS
    visual.transformer.resblocks[first].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    visual(tensors["images"][:1])
    kept = {"input": seen[0].contiguous()}
    for name, value in tensors.items():
        head, _, rest = name.removeprefix("visual.transformer.resblocks.").partition(".")
        if not name.startswith("visual.transformer.resblocks."):
            kept |= {} if name in NOT_NEEDED else {name: value}
        elif int(head) >= first:
            kept[f"visual.transformer.resblocks.{int(head) - first}.{rest}"] = value
    return kept


def main(source: str, target: str) -> None:
    with safe_open(source, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    if "visual.proj" in tensors:
        config = ast.literal_eval(metadata["config"])
        tensors = last_blocks(tensors, config)
        metadata = {**metadata, "config": str({**config, "layers": KEPT_BLOCKS})}
    save_file({name: reduced(name, tensor) for name, tensor in tensors.items()}, target, metadata=metadata)


if __name__ == "__main__":
    main(*sys.argv[1:])
