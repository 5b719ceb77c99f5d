"""CLIP weights in the forms that people have them in. They are read as tensors; no code of a file runs."""

import io
import math
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")  # numbers that only OpenAI's files hold
TRANSFORMERS_NAMES = {  # of transformers' CLIPModel -> of open_clip, replaced one after the other
    "vision_model.": "visual.", "text_model.": "", "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.patch_embedding": "conv1", "embeddings.": "", "pre_layrnorm": "ln_pre", "post_layernorm": "ln_post",
    "final_layer_norm": "ln_final", "layer_norm": "ln_", "encoder.layers": "transformer.resblocks",
    "self_attn": "attn", "fc1": "c_fc", "fc2": "c_proj", "q_proj.": "in_proj_",
}  # fmt: skip
STORAGES = {"HalfStorage": torch.half, "FloatStorage": torch.float, "LongStorage": torch.long}


def read_weights(source: Mapping[str, Any] | str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, of what `torch.save` wrote, or of a TorchScript archive, by name.

    A wrapping "state_dict" and the prefix of parallel training are taken off, of a mapping too. Raises ValueError in
    one sentence where a file holds anything that could run code, or is damaged."""
    state: Any = source if isinstance(source, Mapping) else read_file(Path(source).expanduser())
    state = state.get("state_dict", state) if isinstance(state, Mapping) else None
    named = state.items() if isinstance(state, Mapping) else ()
    return {str(name).removeprefix("module."): value for name, value in named if isinstance(value, Tensor)}


def read_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint file {path}")
    with path.open("rb") as file:
        start = file.read(9)
    try:
        if start[8:] == b"{":  # a header's length, then JSON: safetensors, whatever the suffix
            return load_file(path)
        if zipfile.is_zipfile(path) and (archived := read_archive(path)) is not None:
            return archived
        with warnings.catch_warnings(action="ignore"):  # of pickle protocols: it reads them or refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # there is no list of what the readers raise at other bytes
        reason = " ".join(str(error).split()).partition(". ")[0][:100] or type(error).__name__
        told = f"{path} cannot be read as a checkpoint of tensors only ({reason}); it is damaged, or holds objects"
        raise ValueError(f"{told} that could run code; save it again: torch.save(model.state_dict(), ...)") from error


def read_archive(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a TorchScript archive; None of another zip file."""
    with zipfile.ZipFile(path) as archive:
        folders = [name.removesuffix("constants.pkl") for name in archive.namelist() if name.endswith("/constants.pkl")]
        return dict(named_tensors(ArchiveReader(archive, folders[0]).load())) if folders else None


class Inert:
    """Stands for an object of an archive: it has that one's attributes, and does nothing."""

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.attributes = attributes


class ArchiveReader(pickle.Unpickler):
    """Reads a TorchScript archive's tree of modules; `torch.jit.load` would compile its code, and may run some. What
    the archive's pickle names must be a tensor, a storage or an ordered dictionary, or it becomes `Inert`."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        def content(name: str) -> bytes:
            if archive.getinfo(folder + name).compress_type != zipfile.ZIP_STORED:
                raise pickle.UnpicklingError(f"{name} is compressed")  # it could become any size
            return archive.read(folder + name)

        super().__init__(io.BytesIO(content("data.pkl")))
        self.storage = cache(lambda key, dtype: torch.frombuffer(bytearray(content(f"data/{key}")), dtype=dtype))

    def persistent_load(self, pid: tuple[str, torch.dtype, str, str, int]) -> Tensor:
        return self.storage(pid[2], pid[1])

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return Inert
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return strided
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def strided(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: object) -> Tensor:
    if math.prod(size) > len(storage):  # a stride of 0 would make any size of one number
        raise pickle.UnpicklingError(f"a tensor of size {size} is larger than its storage")
    return storage.as_strided(size, stride, offset)


def named_tensors(module: Inert, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    attributes, module.attributes = module.attributes, {}  # each module once, however often it is referred to
    for name, value in attributes.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, Inert):
            yield from named_tensors(value, f"{prefix}{name}.")


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state of transformers' CLIPModel in open_clip's names."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".q_proj." in name:
            value = torch.cat([state[name.replace(".q_", f".{letter}_")] for letter in "qkv"])
        elif name in ("visual_projection.weight", "text_projection.weight"):
            name, value = name.replace("visual_projection", "visual.proj").removesuffix(".weight"), value.T
        for theirs, ours in TRANSFORMERS_NAMES.items():
            name = name.replace(theirs, ours)
        renamed[name] = value
    return {name: value for name, value in renamed.items() if ".k_proj." not in name and ".v_proj." not in name}


def load_weights(model: nn.Module, path: str | Path, name: str) -> bool:
    """Fills an open_clip model, in its own precision, from a file of any; returns whether that file is OpenAI's. Raises
    ValueError, in one sentence, where the file holds anything but the weights of such a model."""
    state = read_weights(path)
    try:
        state = from_transformers(state) if any(key.startswith("vision_model.") for key in state) else state
    except KeyError as error:
        raise ValueError(f"{path} holds no weights of {name}: {error} is not there") from error
    openai = [state.pop(key) for key in OPENAI_EXTRAS if key in state]
    state = {key: value for key, value in state.items() if not key.endswith(("attn_mask", "position_ids"))}
    if "logit_scale" in state:
        state["logit_scale"] = state["logit_scale"].squeeze()
    try:
        integers = [key for key, value in state.items() if not value.is_floating_point()]
        if integers:  # such as quantised weights, which torch would copy as they are
            raise RuntimeError(f"{integers[0]} is {state[integers[0]].dtype}")
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} holds no weights of {name}: {' '.join(str(error).split())[:400]}") from error
    return bool(openai)
