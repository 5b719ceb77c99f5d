"""Loss terms by hand on pictures of four pixels, and against plain twins in value and gradient."""

import math

import plain
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from sptseg.model import ops
from sptseg.training import present_pairs, segmentation_loss

kinds = pytest.mark.parametrize("kind", ["spt", "zegclip"])


def random_labels(classes: int, *size: int) -> Tensor:
    """Blocks of 3 x 3 pixels, so that some classes are absent from some images, and some pixels ignored."""
    labels = torch.randint(0, classes, size).repeat_interleave(3, -1).repeat_interleave(3, -2)[:, : size[1], : size[2]]
    return labels.masked_fill(torch.rand(size) < 0.1, 255)


def test_focal_and_dice_of_four_pixels() -> None:
    """Logit 0 everywhere: p = 1/2. Two classes, labels 0, 0, 1, ignored."""
    terms = segmentation_loss(torch.zeros(1, 2, 2, 2), torch.tensor([[[0, 0], [1, 255]]]), "zegclip")
    positive, negative = 0.25 * 0.25 * math.log(2), 0.75 * 0.25 * math.log(2)
    focal = ((2 * positive + 2 * negative) / 4 + (positive + 3 * negative) / 4) / 2  # two pairs present
    # class 0: overlap 2 * 0.5, sums 2 and 2; class 1: overlap 0.5, sums 2 and 1
    dice = ((1 - (2 * 1.0 + 1) / (2 + 2 + 1)) + (1 - (2 * 0.5 + 1) / (2 + 1 + 1))) / 2
    assert terms["focal"].item() == pytest.approx(100 * focal)
    assert terms["dice"].item() == pytest.approx(dice)
    assert terms["total"].item() == pytest.approx(100 * focal + dice)


def test_one_certain_pixel_and_an_absent_class() -> None:
    """p = 3/4 on a pixel that holds the class: focal 0.25 (1/4)² ln(4/3), dice 1 - (1.5 + 1) / (1.75 + 1).

    An absent class of p = 1/2 adds 0.75 (1/2)² ln 2 to focal and nothing to dice. Equal maps have no loss in SSIM.
    """
    logits, labels = torch.tensor([math.log(3), 0]).view(1, 2, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long)
    terms = segmentation_loss(logits, labels, "zegclip")
    focal = 0.25 / 16 * math.log(4 / 3) + 0.75 / 4 * math.log(2)
    assert terms["focal"].item() == pytest.approx(100 * focal, rel=1e-5)
    assert terms["dice"].item() == pytest.approx(1 - 2.5 / 2.75, rel=1e-5)
    labels = torch.randint(0, 3, (2, 9, 12))
    assert segmentation_loss(plain.one_hot(labels, 3), labels)["ssim"].abs() < 1e-4


def difference(ours: Tensor, twin: Tensor) -> float:
    """Norm of the difference, over the twin's where that is not tiny."""
    return ((ours.double() - twin.double()).norm() / (twin.double().norm() + 1e-2)).item()


@pytest.mark.parametrize("at_once", [1, 2**19])
@kinds
@settings(max_examples=15, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 5)), st.tuples(*[st.integers(1, 6)] * 2),
    st.tuples(*[st.integers(1, 30)] * 2), st.booleans(), st.none() | st.floats(0.5, 40),
)  # fmt: skip
def test_values_and_gradients_equal_the_plain_twin(
    kind: str, at_once: int, maps: tuple[int, int], grid: tuple, size: tuple, ignored: bool, pairs: float | None
) -> None:
    """One map at a time and all at once; up- and downsampled; with some classes, or all, absent; in every term."""
    batch, classes = maps
    labels = random_labels(classes, batch, *size)
    assert present_pairs(labels, classes).tolist() == [[c in each for c in range(classes)] for each in labels]
    if ignored:
        labels[-1] = 255
    count = None if pairs is None else torch.tensor(pairs)
    ours = (3 * torch.randn(batch, classes, *grid)).requires_grad_()
    twin = ours.detach().double().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "PIXELS_AT_ONCE", at_once)
        terms = segmentation_loss(ours, labels.to(torch.uint8 if ignored else torch.int64), kind, pairs=count)
    expected = plain.segmentation_loss(twin, labels, kind, pairs=count)
    assert set(terms) == set(expected)
    for name, value in expected.items():
        assert_close(terms[name].double(), value, rtol=1e-4, atol=1e-5, msg=name)
        (gradient,) = torch.autograd.grad(3 * terms[name], ours, retain_graph=True)
        (wanted,) = torch.autograd.grad(3 * value, twin, retain_graph=True)
        assert difference(gradient, wanted) < 1e-3, name


@kinds
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (5, 42), (31, 70), (32, 33), (150, 101)])
def test_loss_and_gradient_are_exact_to_a_hundred_thousandth(size: tuple[int, int], bfloat16: bool, kind: str) -> None:
    """In one to several tiles of the window, uneven, most classes absent, specks of one at borders. SSIM's gradient
    alone is less exact in float32, the plain twin's as well: it divides by differences of nearly equal numbers.
    Autocast's logits come in bfloat16; the loss is computed in float32 all the same, only its gradient is rounded."""
    labels, dtype = random_labels(3, 2, *size), torch.bfloat16 if bfloat16 else torch.float32
    labels[1] = 1
    labels[:, 4::27, ::31] = 0
    labels[1, size[0] // 2 :] = 255
    ours = (2 * torch.randn(2, 12, 10, 7)).to(dtype).requires_grad_()
    twin = ours.detach().double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        terms = segmentation_loss(ours, labels, kind)
    expected = plain.segmentation_loss(twin, labels, kind)
    for name, value in expected.items():
        assert_close(terms[name].double(), value, rtol=1e-5, atol=0, msg=name)
    (gradient,) = torch.autograd.grad(terms["total"], ours)
    (wanted,) = torch.autograd.grad(expected["total"], twin)
    assert gradient.dtype == dtype and difference(gradient, wanted) <= (4e-3 if bfloat16 else 1e-5)


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([-1e4, -100.0, 100.0, 1e4]).view(1, 1, 1, 4).requires_grad_()
    for kind in ("spt", "zegclip"):
        terms = segmentation_loss(logits, torch.tensor([[[0, 255, 0, 255]]]), kind)
        (gradient,) = torch.autograd.grad(terms["total"], logits)
        assert terms["total"].isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        (torch.full((2, 4, 4), 3), "spt", r"the value 3; with 3 classes 0 to 2 and 255 \(ignored\) .* map unseen"),
        (torch.full((2, 4, 4), -1), "spt", "the value -1"),
        (torch.zeros(2, 1, 4, 4), "spt", r"shape \(2, 1, 4, 4\); wanted \(2, height, width\)"),
        (torch.zeros(2, 4, 4), "dice", "'dice'; wanted 'spt' or 'zegclip'"),
    ],
)
def test_what_is_no_label_or_loss_is_refused(labels: Tensor, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segmentation_loss(torch.zeros(2, 3, 2, 2), labels, kind)
