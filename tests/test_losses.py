"""Loss terms by hand on pictures of four pixels, and against plain twins in value and gradient."""

from __future__ import annotations

import math

import plain
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from sptseg import losses
from sptseg.losses import present_pairs, segmentation_loss

few = settings(max_examples=15, deadline=None)


def plain_focal(logits: Tensor, target: Tensor, pairs: int) -> Tensor:
    """-0.25 (1-p)² log p where the class is, -0.75 p² log(1-p) elsewhere, ignored pixels included."""
    p = logits.sigmoid()
    terms = torch.where(target > 0, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log())
    return 100 * terms.mean(dim=(2, 3)).sum() / pairs


def plain_dice(logits: Tensor, target: Tensor, pairs: int) -> Tensor:
    total = logits.new_zeros(())
    for p, t in zip(logits.sigmoid().flatten(0, 1), target.flatten(0, 1), strict=True):
        if t.any():
            total = total + 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
    return total / pairs


def plain_ssim(logits: Tensor, target: Tensor) -> Tensor:
    """The formula with a two-dimensional window, one map after the other."""
    d = torch.arange(-5, 6, dtype=logits.dtype)
    window = torch.exp(-(d[:, None] ** 2 + d[None] ** 2) / (2 * 1.5**2))
    window = (window / window.sum())[None, None]

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x[None, None], window, padding=5)

    values = []
    for x, y in zip(logits.flatten(0, 1), target.flatten(0, 1), strict=True):
        mx, my = mean(x), mean(y)
        vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
        values.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    return 1 - torch.cat(values).mean()


def one_hot(labels: Tensor, classes: int) -> Tensor:
    return torch.stack([labels == c for c in range(classes)], dim=1).double()


def plain_losses(logits: Tensor, labels: Tensor, kind: str) -> dict[str, Tensor]:
    """The slow obvious way, in float64, with autograd's gradients."""
    target = one_hot(labels, logits.shape[1])
    large = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    pairs = max(1, int(target.flatten(2).any(dim=2).sum()))
    second = plain_ssim(large, target) if kind == "spt" else plain_dice(large, target, pairs)
    return {"focal": plain_focal(large, target, pairs), "ssim" if kind == "spt" else "dice": second}


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
    assert set(terms) == {"focal", "dice", "total"}


def test_one_certain_pixel() -> None:
    """p = 3/4 on a pixel that holds the class: focal 0.25 (1/4)² ln(4/3), dice 1 - (1.5 + 1) / (1.75 + 1)."""
    terms = segmentation_loss(torch.full((1, 1, 1, 1), math.log(3)), torch.zeros(1, 1, 1, dtype=torch.long), "zegclip")
    assert terms["focal"].item() == pytest.approx(100 * 0.25 / 16 * math.log(4 / 3), rel=1e-5)
    assert terms["dice"].item() == pytest.approx(1 - 2.5 / 2.75, rel=1e-5)


def test_absent_classes_count_in_focal_but_not_in_dice() -> None:
    labels = torch.zeros(1, 2, 2, dtype=torch.long)
    one, two = (segmentation_loss(torch.zeros(1, n, 2, 2), labels, "zegclip") for n in (1, 2))
    assert two["dice"].item() == pytest.approx(one["dice"].item())
    assert (two["focal"] - one["focal"]).item() == pytest.approx(100 * 0.75 * 0.25 * math.log(2), rel=1e-5)


def test_ssim_of_equal_maps_is_no_loss() -> None:
    labels = torch.randint(0, 3, (2, 9, 12))
    assert segmentation_loss(one_hot(labels, 3).float(), labels)["ssim"].abs() < 1e-4


@pytest.mark.parametrize("kind", ["spt", "zegclip"])
def test_ignored_pixels_are_negatives(kind: str) -> None:
    """255 acts as any class that has no query; in a method that left it out, the logits there would not matter."""
    labels = torch.tensor([[[0, 1, 255, 255]]])
    logits = torch.randn(1, 2, 1, 4, requires_grad=True)
    segmentation_loss(logits, labels, kind)["total"].backward()
    assert (logits.grad[..., 2:] != 0).all()
    louder = torch.cat([logits[..., :2], logits[..., 2:] + 3], dim=-1)
    assert segmentation_loss(louder, labels, kind)["focal"] > segmentation_loss(logits, labels, kind)["focal"]


@pytest.mark.parametrize("kind", ["spt", "zegclip"])
def test_a_batch_without_any_class_divides_by_one(kind: str) -> None:
    terms = segmentation_loss(torch.zeros(1, 2, 2, 2), torch.full((1, 4, 4), 255), kind)
    assert terms["focal"].item() == pytest.approx(100 * 2 * 0.75 * 0.25 * math.log(2), rel=1e-5)
    assert terms.get("dice", torch.tensor(0.0)) == 0
    assert terms["total"].isfinite()


@pytest.mark.parametrize("pairs", [torch.tensor(4), torch.tensor(4.0)])
def test_pairs_counted_elsewhere(pairs: Tensor) -> None:
    logits, labels = torch.randn(2, 3, 2, 2), torch.tensor([[[0, 0], [2, 2]], [[1, 1], [1, 255]]])
    assert present_pairs(labels, 3).tolist() == [[True, False, True], [False, True, False]]
    for kind, terms in (("spt", {"focal": 3 / 4, "ssim": 1}), ("zegclip", {"focal": 3 / 4, "dice": 3 / 4})):
        own, other = segmentation_loss(logits, labels, kind), segmentation_loss(logits, labels, kind, pairs=pairs)
        for name, ratio in terms.items():
            assert_close(other[name], own[name] * ratio)


def test_two_halves_with_common_pairs_are_the_whole() -> None:
    logits, labels = torch.randn(4, 3, 3, 3), torch.randint(0, 3, (4, 6, 6))
    pairs = present_pairs(labels, 3).sum()
    for kind, term in (("spt", "focal"), ("zegclip", "dice")):
        halves = [segmentation_loss(logits[i : i + 2], labels[i : i + 2], kind, pairs=pairs) for i in (0, 2)]
        assert_close(halves[0][term] + halves[1][term], segmentation_loss(logits, labels, kind)[term])


@pytest.mark.parametrize("at_once", [1, 2**19])
@pytest.mark.parametrize("kind", ["spt", "zegclip"])
@few
@given(st.integers(1, 3), st.integers(1, 5), st.tuples(*[st.integers(1, 6)] * 2), st.tuples(*[st.integers(1, 30)] * 2))
def test_values_and_gradients_equal_the_plain_twins(
    kind: str, at_once: int, batch: int, classes: int, grid: tuple[int, int], size: tuple[int, int]
) -> None:
    """One map at a time and all at once, up- and downsampled, classes present and absent; each term's own gradient."""
    labels = random_labels(classes, batch, *size)
    ours = (3 * torch.randn(batch, classes, *grid)).requires_grad_()
    twin = ours.detach().double().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "PIXELS_AT_ONCE", at_once)
        terms = segmentation_loss(ours, labels, kind)
    expected = plain_losses(twin, labels, kind)
    for name, value in expected.items():
        assert_close(terms[name].double(), value, rtol=1e-4, atol=1e-5, msg=name)
        (gradient,) = torch.autograd.grad(terms[name], ours, retain_graph=True)
        (wanted,) = torch.autograd.grad(value, twin, retain_graph=True)
        assert (gradient - wanted).norm() <= 1e-3 * wanted.norm() + 1e-5, name
    (total,) = torch.autograd.grad(3 * terms["total"], ours)
    (wanted,) = torch.autograd.grad(3 * torch.stack(list(expected.values())).sum(), twin)
    assert (total - wanted).norm() <= 1e-3 * wanted.norm() + 1e-5


@pytest.mark.parametrize("kind", ["spt", "zegclip"])
def test_equal_to_the_plain_module_on_a_larger_batch(kind: str) -> None:
    labels = random_labels(20, 2, 96, 80)
    ours = torch.randn(2, 20, 12, 10, requires_grad=True)
    results = []
    for function in (segmentation_loss, plain.segmentation_loss):
        terms = function(ours, labels, kind, pairs=torch.tensor(7.0))
        results.append((terms, *torch.autograd.grad(terms["total"], ours)))
    (terms, gradient), (expected, wanted) = results
    assert_close(terms, expected, rtol=1e-4, atol=0)
    assert (gradient - wanted).norm() < 1e-4 * wanted.norm()


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([-1e4, -100.0, 100.0, 1e4]).view(1, 1, 1, 4).requires_grad_()
    for kind in ("spt", "zegclip"):
        terms = segmentation_loss(logits, torch.tensor([[[0, 255, 0, 255]]]), kind)
        (gradient,) = torch.autograd.grad(terms["total"], logits)
        assert terms["total"].isfinite() and gradient.isfinite().all()


def test_logits_are_upsampled_bilinearly() -> None:
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 16, 25))
    large = F.interpolate(logits, size=(16, 25), mode="bilinear", align_corners=False)
    for kind in ("spt", "zegclip"):
        assert_close(segmentation_loss(logits, labels, kind), segmentation_loss(large, labels, kind))


def test_labels_of_any_integer_type_are_read_and_not_changed() -> None:
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 8, 8))
    labels[0, 0] = 255
    given, expected = labels.clone(), segmentation_loss(logits, labels)
    for kind in (torch.uint8, torch.int16, torch.int32):
        assert_close(segmentation_loss(logits, labels.to(kind)), expected)
    assert torch.equal(labels, given)


@pytest.mark.parametrize("kind", ["spt", "zegclip"])
def test_autocast_does_not_touch_the_loss(kind: str) -> None:
    """In bfloat16 the variances of SSIM, differences of nearly equal numbers, would be noise."""
    logits, labels = 5 * torch.randn(1, 3, 8, 8), torch.randint(0, 3, (1, 16, 16))
    expected = segmentation_loss(logits, labels, kind)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(segmentation_loss(logits, labels, kind), expected)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            torch.full((2, 4, 4), 3),
            r"the value 3; with 3 classes 0 to 2 and 255 \(ignored\) .* map unseen classes to 255",
        ),
        (torch.full((2, 4, 4), -1), "the value -1"),
        (torch.full((2, 4, 4), 254), "the value 254"),
        (torch.zeros(1, 4, 4), r"shape \(1, 4, 4\); wanted \(2, height, width\)"),
        (torch.zeros(2, 1, 4, 4), r"shape \(2, 1, 4, 4\); wanted \(2, height, width\)"),
    ],
)
def test_wrong_labels_are_refused(labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segmentation_loss(torch.zeros(2, 3, 2, 2), labels)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="'dice'; wanted 'spt' or 'zegclip'"):
        segmentation_loss(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2), "dice")
