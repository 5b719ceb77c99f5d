"""Makes the reduced reference sets beside this file: python reduce.py SOURCE TARGET

Of what is large, the first image only; of its scores, every second pixel; labels in the smallest type that holds them.
"""

import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_file

FIRST_ONLY = ("output/encoder_layer_", "output/patch_embedding", "output/decoder_", "output/scores")


def reduced(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name.startswith(("train/label", "selftrain/label")):
        return tensor.to(torch.int16 if tensor.min() < 0 else torch.uint8)
    if name == "output/scores":
        tensor = tensor[..., ::2, ::2]
    return tensor[:1].contiguous() if name.startswith(FIRST_ONLY) else tensor


def main(source: str, target: str) -> None:
    with safe_open(source, "pt") as file:
        tensors = {name: reduced(name, file.get_tensor(name)) for name in file.keys()}
        save_file(tensors, target, metadata=file.metadata())


if __name__ == "__main__":
    main(*sys.argv[1:])
