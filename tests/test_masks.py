"Masks by queries: matching, losses and classes per pixel are transformers'; what does not count has no effect; objects come apart."

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import given, strategies as st

from dinolab.core.errors import InputError
from dinolab.models.backbones import FeatureSpec
from dinolab.models.heads import MaskHead, create_head, create_segmentation_model, predict_objects
from dinolab.models.masks import (
    NO_OBJECT,
    QueryMasks,
    Truth,
    class_logits,
    find_objects,
    match,
    pair_costs,
    set_loss,
    truth_of,
)
from dinolab.train.losses import make_loss

H, W = 8, 12


def scene(seed, images=2, queries=7, classes=4, h=H, w=W):
    "Random queries, and labels in blocks."
    g = torch.Generator().manual_seed(seed)
    named = torch.randn(images, queries, classes + 1, generator=g)
    masks = 3 * torch.randn(images, queries, h, w, generator=g)
    target = torch.randint(0, classes, (images, h // 4, w // 4), generator=g)
    target = target.repeat_interleave(4, 1).repeat_interleave(4, 2)
    return named, masks, target


def at_all_pixels(monkeypatch, modeling):
    "transformers samples points at random: here, the middle of every pixel once."
    y, x = np.indices((H, W))
    points = torch.from_numpy(np.stack([(x + 0.5) / W, (y + 0.5) / H], -1).reshape(1, -1, 2)).float()
    monkeypatch.setattr(modeling.torch, "rand", lambda *size, **kw: points.expand(size[0], -1, -1))
    every = lambda self, logits, *args: points.expand(len(logits), -1, -1)
    monkeypatch.setattr(modeling.Mask2FormerLoss, "sample_points_using_uncertainty", every)


@pytest.mark.parametrize("seed", range(4))
def test_matching_and_losses_are_those_of_mask2former(monkeypatch, seed):
    modeling = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    config = modeling.Mask2FormerConfig(
        num_labels=4,
        train_num_points=H * W,
        no_object_weight=NO_OBJECT,
        class_weight=2.0,
        mask_weight=5.0,
        dice_weight=5.0,
    )
    theirs = modeling.Mask2FormerLoss(config, {})
    at_all_pixels(monkeypatch, modeling)
    named, masks, target = scene(seed)
    truths = [truth_of(t) for t in target]
    full = [truth.masks.view(-1, H, W) for truth in truths]
    indices = theirs.matcher(masks, named, full, [truth.labels for truth in truths])
    for i, (rows, columns) in enumerate(indices):
        mine = match(named[i], masks[i].flatten(1), truths[i])
        assert torch.equal(mine[0], rows) and torch.equal(mine[1], columns)
    expected = theirs.loss_masks(masks, full, indices, sum(len(t.labels) for t in truths))
    expected |= theirs.loss_labels(named, [truth.labels for truth in truths], indices)
    found = set_loss(named, masks, truths)
    for mine, name in (("classes", "loss_cross_entropy"), ("cross", "loss_mask"), ("dice", "loss_dice")):
        torch.testing.assert_close(found[mine], expected[name], atol=1e-5, rtol=1e-5)


def test_costs_are_those_of_maskformer_pair_by_pair():
    modeling = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    named, masks, target = scene(3)
    truth, flat = truth_of(target[0]), masks[0].flatten(1)
    expected = (
        5 * modeling.pair_wise_sigmoid_cross_entropy_loss(flat, truth.masks)
        + 5 * modeling.pair_wise_dice_loss(flat, truth.masks)
        - 2 * named[0].softmax(-1)[:, truth.labels]
    )
    torch.testing.assert_close(pair_costs(named[0], flat, *truth[:2]), expected, atol=1e-5, rtol=1e-5)


def test_classes_per_pixel_are_those_of_eomt():
    image_processing = pytest.importorskip("transformers.models.eomt.image_processing_eomt")
    named, masks, _ = scene(5, h=384, w=384)
    processor = image_processing.EomtImageProcessor(
        size={"shortest_edge": 384, "longest_edge": 384}, do_split_image=False
    )
    queries = dict(masks_queries_logits=masks, class_queries_logits=named)
    out = SimpleNamespace(**queries, patch_offsets=[])
    sizes = [(384, 384)] * 2
    theirs = processor.post_process_semantic_segmentation(out, sizes, return_segmentation_scores=True)
    mine = class_logits(named, masks)
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a.exp(), b.segmentation_scores, atol=1e-5, rtol=1e-5)
        assert torch.equal(a.argmax(0), b.segmentation)


@examples(15)
@given(st.integers(0, 999))
def test_what_does_not_count_has_no_effect(seed):
    named, masks, target = scene(seed)
    on = torch.rand(target.shape, generator=torch.Generator().manual_seed(seed)) > 0.4
    other_masks = torch.where(on[:, None], masks, 9.0)
    other_target = torch.where(on, target, 255)
    a = QueryMasks([named], [masks]).loss(target, on)
    b = QueryMasks([named], [other_masks]).loss(other_target, on)
    torch.testing.assert_close(a, b)
    assert not torch.isclose(a, QueryMasks([named], [masks]).loss(target))


def test_an_image_of_which_nothing_is_known_has_no_effect():
    named, masks, target = scene(1)
    on = torch.ones_like(target, dtype=torch.bool)
    on[1] = False
    both = QueryMasks([named], [masks]).loss(target, on)
    first = QueryMasks([named[:1]], [masks[:1]]).loss(target[:1])
    torch.testing.assert_close(both, first)
    with pytest.raises(InputError, match="the mask is empty"):
        QueryMasks([named], [masks]).loss(target, on & False)


def test_labels_meet_masks_at_their_stride():
    "Masks of stride 4 over a padded image: what is beyond the image does not count."
    target = torch.zeros(1, 13, 18, dtype=torch.long)
    target[:, :, 8:] = 1
    masks = torch.full((1, 2, 4, 5), -20.0)
    masks[0, 0, :, :2], masks[0, 1, :, 2:] = 20, 20
    named = torch.tensor([[[9.0, -9, -9], [-9, 9, -9]]])
    right = QueryMasks([named], [masks], (16, 20))
    assert right.loss(target) < 1e-3
    masks[0, :, :, 4] = 0  # its middle is at pixel 18, beyond the edge
    assert QueryMasks([named], [masks], (16, 20)).loss(target) < 1e-3
    masks[0, :, :, 3] = 0
    assert QueryMasks([named], [masks], (16, 20)).loss(target) > 0.1


def test_class_weights_reach_the_classes():
    named, masks, target = scene(2)
    weights = torch.tensor([0.2, 1.0, 3.0, 1.0])
    truths = [truth_of(t) for t in target]
    found = set_loss(named, masks, truths, weights)["classes"]
    wanted = torch.full(named.shape[:2], 4)
    for i, truth in enumerate(truths):
        rows, columns = match(named[i], masks[i].flatten(1), truth)
        wanted[i, rows] = truth.labels[columns]
    expected = torch.nn.functional.cross_entropy(
        named.flatten(0, 1), wanted.flatten(), torch.cat([weights, torch.tensor([0.1])])
    )
    torch.testing.assert_close(found, expected)
    through = make_loss("ce", weights)(QueryMasks([named], [masks]), target, target >= 0)
    torch.testing.assert_close(through, QueryMasks([named], [masks]).loss(target, weight=weights))


def test_objects_are_masks_of_their_own():
    objects = torch.tensor([[1, 1, 0, 2, 2], [1, 1, 0, 2, 2]])
    target = torch.where(objects > 0, 1, 0)
    truth = truth_of(target, objects=objects)
    assert truth.labels.tolist() == [0, 1, 1] and torch.equal(truth.masks.sum(0), torch.ones(10))
    named = torch.full((1, 4, 3), -9.0)
    named[0, 0, 0] = named[0, 1, 1] = named[0, 2, 1] = named[0, 3, 2] = 9
    masks = 40 * torch.cat([truth.masks, truth.masks[:1] * 0]).view(1, 4, 2, 5) - 20
    assert QueryMasks([named], [masks]).loss(target[None], objects=objects[None]) < 1e-3
    found = find_objects(named[0], masks[0])
    assert sorted(row["pixels"] for row in found.table) == [4, 4]
    assert all(row["kind"] == 1 and row["score"] > 0.99 for row in found.table)
    numbers = {tuple(objects.numpy()[found.labels == n]) for n in (1, 2)}
    assert numbers == {(1,) * 4, (2,) * 4} and not found.labels[objects.numpy() == 0].any()
    assert len(find_objects(named[0], masks[0], background=()).table) == 3
    assert find_objects(named[0], masks[0], min_size=5).table == []
    for wrong in (dict(threshold=2), dict(min_size=0)):
        with pytest.raises(InputError, match="expected"):
            find_objects(named[0], masks[0], **wrong)


def test_scores_are_class_probability_times_certainty_of_the_mask():
    named, masks, _ = scene(4, images=1)
    scores = named[0].softmax(-1)[:, :-1].amax(-1)
    for q, one in enumerate(masks[0]):
        found = find_objects(named[0, q : q + 1], one[None], threshold=0.0, background=())
        expected = float(scores[q] * one[one > 0].sigmoid().mean())
        assert found.table[0]["score"] == pytest.approx(expected, abs=1e-5)
        assert found.table[0]["pixels"] == int((one > 0).sum())


SMALL = dict(queries=6, decoder_layers=2, hidden_size=16)


@pytest.mark.parametrize(
    "spec", [FeatureSpec(8, 16), FeatureSpec((8,) * 4, (16,) * 4), FeatureSpec((4, 8), (4, 8))]
)
def test_any_number_of_maps(spec):
    head = create_head("mask", spec, 3, **SMALL)
    maps = [torch.rand(2, c, *s) for c, s in zip(spec.channels, spec.sizes(40, 56))]
    found = head.train()(maps)
    assert len(found.masks) == len(found.classes) == 3
    assert head.eval()(maps).shape == (2, 3, *maps[0].shape[2:])


def test_one_class_is_one_logit():
    torch.manual_seed(0)
    spec = FeatureSpec((4, 8), (4, 8))
    head = create_head("mask", spec, 1, **SMALL).eval()
    maps = [torch.rand(1, c, *s) for c, s in zip(spec.channels, spec.sizes(32, 32))]
    with torch.no_grad():
        logit, found = head(maps), head.queries(maps)
    p = class_logits(found.classes[-1], found.masks[-1]).softmax(1)[:, 1:]
    assert logit.shape == (1, 1, 8, 8)
    torch.testing.assert_close(logit.sigmoid(), p)


def test_a_network_learns_classes_and_the_frozen_part_stays():
    torch.manual_seed(0)
    options = dict(head="mask", num_classes=2, freeze_backbone=True, **SMALL)
    model = create_segmentation_model("convnext_atto", **options).train()
    before = model.backbone.weights_hash
    image = torch.full((1, 3, 50, 70), 0.3)
    image[..., 35:] = 0.8
    target = (image[:, 0] > 0.5).long()
    loss_of = make_loss("ce+dice")
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    for _ in range(60):
        loss = loss_of(model(image), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.backbone.weights_hash == before
    with torch.no_grad():
        found = model.eval()(image).argmax(1)
    assert (found == target).float().mean() > 0.97
    objects = predict_objects(model, image)[0]
    assert len(objects.table) == 1 and objects.labels.shape == (50, 70)


def test_what_the_mask_head_cannot_do_is_said():
    for wrong, message in (
        (dict(hidden_size=20), "multiple of 8"),
        (dict(queries=2, num_classes=5), "as many at least"),
        (dict(stem=8), "leave them out"),
        (dict(pool_scales=(1,)), "the mask head has no pool_scales"),
    ):
        with pytest.raises(InputError, match=message):
            create_segmentation_model("resnet18", **(dict(head="mask", num_classes=2) | wrong))
    with pytest.raises(InputError, match="head='mask'"):
        predict_objects(create_segmentation_model("resnet18", head="linear"), torch.rand(1, 3, 32, 32))
    with pytest.raises(InputError, match="the upernet head has no queries"):
        create_segmentation_model("resnet18", head="upernet", queries=5)
    assert isinstance(create_segmentation_model("resnet18", head="mask").head, MaskHead)
    assert Truth._fields == ("labels", "masks", "on")
