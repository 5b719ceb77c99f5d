"""Reference tensors of the released code, a CLIP small enough for tests, and what commands refuse."""

import copy
import json
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import open_clip
import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors import safe_open
from torch import Tensor

from sptseg.checkpoints import import_research_checkpoint
from sptseg.model import Clip, SptSeg, WordTokenizer
from sptseg.training.losses import segmentation_loss

BARS = re.compile(r"(evaluating|training|checking)?(: .*)?")  # what progress bars leave on standard error
REFERENCE = Path(__file__).parent / "reference"
DEVICE = os.environ.get("SPTSEG_TEST_DEVICE", "cpu")  # of tests/gpu; all others mean the CPU, and no GPU is seen
if DEVICE == "cpu":
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
torch.set_num_threads(1)  # sums in the same order everywhere, and tests side by side do not fight for cores
settings.register_profile("any machine", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
WORDS = ("a", "photo", "of", "grass", "water", "tree", "boat", "house")


@dataclass(frozen=True)
class Reference:
    """One reference set (see reference/README.md): tensors by name, sizes, and the model imported from its state."""

    kind: str
    tensors: dict[str, Tensor]
    config: dict
    state: dict[str, Tensor]
    imported: SptSeg

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def backward(self, device: str = "cpu", narrow: bool = False) -> dict[str, Tensor]:
        """Logits and loss of the training example, each trained parameter's gradient; `narrow`: bf16 by autocast."""
        model = copy.deepcopy(self.imported).to(device)
        weights = {name: model.get_parameter(name).requires_grad_() for name in model.trained_state()}
        image, text, labels = self["input/image"], self["input/text"][self["input/seen"]], self["train/label"]
        with torch.autocast(device, torch.bfloat16, enabled=narrow):
            logits = model(image.to(device), text.to(device))
        loss = segmentation_loss(logits, labels.to(device), self.kind)["total"]
        gradients = torch.autograd.grad(loss, [*weights.values()])
        found = {"logits": logits, "loss": loss, **dict(zip(weights, gradients, strict=True))}
        return {name: value.detach().float().cpu() for name, value in found.items()}

    def errors(self, device: str, narrow: bool, floor: float) -> dict[str, float]:
        """Of `backward` against the CPU's in float32: relative, to a share `floor` of all gradients at least."""
        found, expected = self.backward(device, narrow), self.backward()
        least = floor * torch.cat([each.flatten() for name, each in expected.items() if "." in name]).norm()
        return {name: float((found[name] - each).norm() / max(each.norm(), least)) for name, each in expected.items()}


@cache
def load_reference(kind: str) -> Reference:
    with safe_open(REFERENCE / f"{kind}_small.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        config = json.loads(file.metadata()["config"])
    state = {k.removeprefix("state/"): v for k, v in tensors.items() if k.startswith("state/")}
    sizes = {key: config[key] for key in ("image_size", "heads", "decoder_heads")}
    return Reference(kind, tensors, config, state, import_research_checkpoint(state, **sizes))


@pytest.fixture(scope="session", params=["spt", "zegclip"])
def reference(request: pytest.FixtureRequest) -> Reference:
    """Both reference sets, one after the other."""
    return load_reference(request.param)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def small_clip(**vision: object) -> Clip:
    """A CLIP of 3 blocks of width 32, 8 x 8 patches of 4 x 4 pixels, embeddings of 32; random, always the same."""
    tokenizer = WordTokenizer(WORDS, context_length=12)
    text = {"context_length": 12, "vocab_size": tokenizer.vocabulary_size, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "patch_size": 4, "width": 32, "layers": 3, "head_width": 16, **vision}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = open_clip.CLIP(32, vision, text)
    return Clip("small", None, model.eval().requires_grad_(False), tokenizer)


@pytest.fixture
def clip() -> Clip:
    return small_clip()


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one sentence on standard error with which a command refuses its input; its exit code is 2."""
    from sptseg.cli import main  # takes a second

    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if not BARS.fullmatch(line) and not line.startswith("note: ")]
    assert stopped.value.code == 2, said
    assert len(lines) == 1 and lines[0].startswith("sptseg: ") and 15 < len(lines[0]) < 2500, said
    return lines[0].removeprefix("sptseg: ")
