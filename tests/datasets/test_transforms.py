"""Sizes worked out by hand, image and mask moving together, and the crop's promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors

from sptseg.datasets import IGNORE, Augmentation, transforms
from sptseg.datasets.transforms import VariedCrop, fitted_size


def pair(height: int, width: int, classes: int = 5) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """A noisy picture and a mask of stripes."""
    image = tv_tensors.Image(torch.randint(0, 256, (3, height, width), dtype=torch.uint8))
    mask = tv_tensors.Mask((torch.arange(width) * classes // width).expand(height, width).clone())
    return image, mask


@pytest.mark.parametrize(
    ("size", "base", "least_short", "expected"),
    [
        ((375, 500), (2048, 512), 1, (512, 683)),  # 512/375 = 1.3653; 500 * 1.3653 = 682.7
        ((100, 1000), (2048, 512), 1, (205, 2048)),  # the long side limits: 2.048
        ((100, 1000), (2048, 512), 512, (512, 5120)),  # ... but the short side has to have 512
        ((10, 1000), (2048, 512), 512, (164, 16384)),  # ... unless that is more than 32 squares of 512
        ((96, 64), None, 128, (192, 128)),
    ],
)
def test_fitted_size(size: tuple[int, int], base: tuple[int, int] | None, least_short: int, expected: tuple) -> None:
    assert fitted_size(*size, base, least_short=least_short) == expected


def test_image_and_mask_move_together() -> None:
    """A picture that shows its own labels still does after every geometric step."""
    labels = torch.zeros(64, 96, dtype=torch.int64)
    labels[:, 30:60], labels[40:, 50:] = 1, 2
    image = tv_tensors.Image((labels * 100).to(torch.uint8).expand(3, -1, -1).clone())
    unchanged = {"resize_base": None, "distortion": 0.0, "mean": (0, 0, 0), "std": (1, 1, 1)}
    transform = transforms.train_transform(Augmentation(crop=48, **unchanged))
    for _ in range(20):
        picture, mask = transform(image, tv_tensors.Mask(labels))
        shown = torch.round(picture[0] * 255 / 100).long()
        assert (shown == mask)[mask != IGNORE].float().mean() > 0.9  # all but edges, where the picture is interpolated


def test_varied_crop_avoids_crops_of_one_class_and_ignored_pixels_do_not_count() -> None:
    """Of the second picture, ignored but for three columns of two classes, a crop has to reach both."""
    mask = torch.zeros(64, 64, dtype=torch.int64)
    mask[:, 40:] = 1
    pictures = {tries: [VariedCrop(16, 0.75, tries)(tv_tensors.Mask(mask)) for _ in range(200)] for tries in (0, 10)}
    uniform = {tries: sum(not 64 <= crop.sum() <= 192 for crop in crops) for tries, crops in pictures.items()}
    assert uniform[0] > 120  # 40 of 49 positions
    assert uniform[10] < 40  # (40/49)^11 = 0.11 of 200
    mask = torch.full((4, 12), IGNORE)
    mask[:, 5], mask[:, 6:8] = 0, 1
    crop = VariedCrop(4, 0.75, tries=100)
    assert all({0, 1} <= set(crop(tv_tensors.Mask(mask)).unique().tolist()) for _ in range(50))


@settings(deadline=None, max_examples=30)
@given(st.integers(3, 150), st.integers(3, 150), st.integers(1, 96), st.integers(0, 9))
def test_training_pairs_always_have_the_crops_size(height: int, width: int, crop: int, seed: int) -> None:
    torch.manual_seed(seed)
    image, mask = transforms.train_transform(Augmentation(crop=crop, resize_base=None))(*pair(height, width))
    assert (image.shape, image.dtype) == ((3, crop, crop), torch.float32) and isinstance(image, tv_tensors.Image)
    assert (mask.shape, mask.dtype) == ((crop, crop), torch.int64) and isinstance(mask, tv_tensors.Mask)
    assert set(mask.unique().tolist()) <= {0, 1, 2, 3, 4, IGNORE}


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_values_by_hand_flipped_and_padded_with_the_mean_and_ignored(flip: float) -> None:
    image, mask = pair(5, 6)
    augmentation = Augmentation(crop=8, resize_base=None, flip=flip, distortion=0.0, scale=(1.0, 1.0))
    mean, std = (torch.tensor(values)[:, None, None] for values in (augmentation.mean, augmentation.std))
    wanted, labels = ((image / 255 - mean) / std).as_subclass(torch.Tensor), mask
    got, got_labels = transforms.train_transform(augmentation)(image, mask)
    wanted, labels = (x.flip(-1) if flip else x for x in (wanted, labels))
    torch.testing.assert_close(got[:, :5, :6].as_subclass(torch.Tensor), wanted)
    assert not got[:, 5:].any() and not got[:, :, 6:].any() and torch.equal(got_labels[:5, :6], labels)
    assert (got_labels[5:] == IGNORE).all() and (got_labels[:, 6:] == IGNORE).all()


def test_distortion_changes_colours_and_keeps_channels_in_place() -> None:
    red = tv_tensors.Image(torch.tensor([200, 60, 40], dtype=torch.uint8)[:, None, None].expand(3, 4, 4).clone())
    distort = transforms._photometric_distortion(0.5)
    seen = torch.stack([distort(red)[:, 0, 0] for _ in range(200)]).float()
    assert len(seen.unique(dim=0)) > 60
    assert (seen[:, 0] >= seen[:, 1:].max(dim=1).values).all()  # red stays the strongest
    assert torch.equal(transforms._photometric_distortion(0.0)(red), red)
