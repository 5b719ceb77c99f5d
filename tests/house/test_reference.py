"""Equality with the released code, stage by stage: its tensors on small random models are in `reference/`."""

from typing import Any

import pytest
import torch
from conftest import Reference
from torch import Tensor
from torch.testing import assert_close

from sptseg.checkpoints import import_report
from sptseg.checkpoints.research import our_name
from sptseg.model.spt_seg import upsample
from sptseg.training.loop import pseudo_labels
from sptseg.training.losses import segmentation_loss

FORWARD = {"atol": 1e-4, "rtol": 0}
NEVER_READ = ("proj_fre", "self_attn", "norm1", "h_proj")


def named_losses(reference: Reference, stage: str) -> dict[str, Tensor]:
    kind = "ssim" if reference.kind == "spt" else "dice"
    terms = {"focal": reference[f"{stage}/loss_mask"], kind: reference[f"{stage}/loss_{kind}"]}
    return {name: value.squeeze() for name, value in {**terms, "total": sum(terms.values())}.items()}


def test_import_leaves_out_exactly_what_is_never_read(reference: Reference) -> None:
    left_out = reference.imported.about["left_out"]
    never = (*NEVER_READ, "multihead_attn") if reference.kind == "spt" else NEVER_READ
    last = f"decoder_1.layers.{reference.config['decoder_layers'] - 1}."  # its query update leads nowhere
    for name in left_out:
        assert any(part in name for part in never) or last in name
    assert all(name in left_out for name in reference.state if any(part in name for part in never))
    assert all(name in import_report(reference.imported) for name in left_out)
    used = {name.removeprefix("grad/") for name in reference.tensors if name.startswith("grad/")}
    assert not used & set(left_out)


@torch.no_grad()
def test_tokens_after_every_block_embeddings_and_scores(reference: Reference) -> None:
    model, images = reference.imported, reference["input/image"]
    states = list(model.encoder.states(images[:1]))
    assert len(states) == reference.config["layers"]
    for i, tokens in enumerate(states):
        assert_close(tokens, reference[f"output/encoder_layer_{i}"], **FORWARD)
    patches, image = model.encoder(images)
    assert_close(patches[:1], reference["output/patch_embedding"], **FORWARD)
    assert_close(image, reference["output/cls_embedding"], **FORWARD)
    scores = upsample(model(images, reference["input/text"]), images.shape[-2:]).sigmoid()
    scores[:, reference["input/seen"]] -= reference.config["seen_offset"]
    assert_close(scores[:1, :, ::2, ::2], reference["output/scores"], **FORWARD)


@torch.no_grad()
def test_queries_and_logits_of_every_decoder_layer(reference: Reference) -> None:
    """On the reference's own patch embeddings, so that an encoder's error cannot hide here. The reference's queries are
    those after the layer; the last layer's do not exist in ours, since nothing reads them."""
    decoder = reference.imported.decoder
    patches, image = reference["output/patch_embedding"], reference["output/cls_embedding"][:1]
    states = list(decoder.states(patches, image, reference["input/text"]))
    assert len(states) == reference.config["decoder_layers"]
    for i, (queries, mask_logits) in enumerate(states):
        theirs = reference[f"output/decoder_layer_{i}_mask_logits"]
        assert_close(mask_logits, theirs, atol=1e-4 * max(1, theirs.abs().max().item()), rtol=0)
        if i < len(states) - 1:
            assert_close(queries, reference[f"output/decoder_layer_{i}_queries"], **FORWARD)
    assert decoder.layers[-1].update is None
    assert torch.equal(states[-1][0], states[-2][0])


def test_losses_and_gradients(reference: Reference) -> None:
    model = reference.imported.requires_grad_(False)
    for name in model.trained_state():
        model.get_parameter(name).requires_grad_(True)
    image = reference["input/image"].clone().requires_grad_()
    text = reference["input/text"][reference["input/seen"]].requires_grad_()
    model.zero_grad()
    losses = segmentation_loss(model(image, text), reference["train/label"], reference.kind)
    expected = named_losses(reference, "train")
    assert set(losses) == set(expected)
    for name, value in losses.items():
        assert_close(value, expected[name], rtol=1e-4, atol=0, msg=name)
    assert_close(losses["total"], reference["train/total"].squeeze(), rtol=1e-4, atol=0)

    losses["total"].backward()
    ours = {name: model.get_parameter(name).grad for name in model.trained_state()}
    checked = {"encoder.prompts"}
    deep = ours["encoder.prompts"][1:], ours["encoder.prompts"][:1]
    for key, theirs in reference.tensors.items():
        if not key.startswith("grad/"):
            continue
        name = key.removeprefix("grad/")
        special = {"input_image": image.grad, "input_text": text.grad}
        special |= {f"backbone.{kind}prompt_embeddings": each for kind, each in zip(("deep_", ""), deep, strict=True)}
        ours_name = our_name(name, reference.kind == "spt")
        gradient: Any = special[name] if name in special else ours[ours_name]
        checked.add(ours_name)
        if key.endswith("attn.k.bias") and ".layers.2." not in key:  # rounding only: softmax ignores a shift of keys
            assert gradient.norm() < 1e-3 * ours[ours_name.replace("bias", "weight")].norm()
        else:
            assert (gradient - theirs).norm() < 1e-3 * theirs.norm(), name
    # the reference lists one of the two of each affine pair in places; what it lists must be nearly all that we train
    assert ours.keys() - checked <= {"encoder.prompt_norm.bias", "encoder.prompt_projection.bias"}


def test_gradients_in_bfloat16_are_nearly_those_in_float32(reference: Reference) -> None:
    """A gradient added up in bfloat16 is off by half and more."""
    errors = reference.errors("cpu", narrow=True, floor=1e-3)
    assert max(errors.values()) < 0.2, max(errors, key=errors.__getitem__)


@torch.no_grad()
def test_self_training(reference: Reference) -> None:
    """All classes' text are the queries; pixels of unseen classes (-1) get the current model's best unseen class."""
    seen = tuple(reference["input/seen"].tolist())
    unseen = tuple(i for i in range(reference.config["num_classes"]) if i not in seen)
    labels = reference["selftrain/label"].long()
    given = labels.clone()
    logits = reference.imported(reference["input/image"], reference["input/text"])
    filled = pseudo_labels(logits, labels, seen, unseen)
    assert torch.equal(labels, given), "labels were changed in place"
    assert torch.equal(filled, reference["selftrain/label_with_pseudo"].to(filled.dtype))
    losses = segmentation_loss(logits, filled, reference.kind)
    for name, expected in named_losses(reference, "selftrain").items():
        assert losses[name].item() == pytest.approx(expected.item(), rel=1e-4), name
