"""Latents compared as pictures: what the distance is, where it looks, and what it teaches."""

from __future__ import annotations

import pytest
import torch
from pipelines import tiny_sdxl
from tiny_runs import some_anchors, tiny_add, tiny_batch, tiny_dinov2, tiny_features

from onestroke.config import DecodeRecipe, StudentRecipe
from onestroke.distill.add import STUDENT
from onestroke.distill.anchors import Anchoring, anchor_loss
from onestroke.distill.decoding import Decoder
from onestroke.distill.features import load_features
from onestroke.distill.perceptual import Perception, perceptual_distance
from onestroke.families.load import from_pipeline
from onestroke.train.anchoring import anchor_batches
from onestroke.train.method import OptimizerSettings
from onestroke.train.trainer import Trainer, TrainSettings


class Given(torch.nn.Module):
    """Features that are the images themselves, as maps or as tokens."""

    def __init__(self, is_spatial: bool) -> None:
        super().__init__()
        self.is_spatial = is_spatial

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [images, images[:, :, :1]] if self.is_spatial else [images.flatten(2).mT]


def test_the_distance_by_hand():
    """Unit vectors of channels: (1, 0) against (0.6, 0.8) is 0.16 + 0.64; against itself, however long, nothing."""
    one, two = (torch.tensor(v).mT.reshape(1, 2, 2, 1) for v in ([[2.0, 0.0], [0.0, 5.0]], [[3.0, 4.0], [0.0, 1.0]]))
    one, two = torch.cat([one, one]), torch.cat([two, one])
    assert perceptual_distance(Given(True), one, two).tolist() == pytest.approx([((0.8 + 0) / 2 + 0.8) / 2, 0])
    assert perceptual_distance(Given(False), one, two).tolist() == pytest.approx([0.8 / 2, 0])


def seen(crop: float, *, features=None) -> Perception:
    model = from_pipeline(tiny_sdxl("v_prediction", True))
    return Perception(Decoder(model, DecodeRecipe(margin=0)), features or tiny_features(), crop, seed=0)


@pytest.mark.parametrize("crop", [1.0, 0.5])
def test_both_are_cut_alike_and_only_the_first_is_pulled(crop, tmp_path):
    perception, slots = seen(crop), torch.arange(3)
    one = torch.randn(3, 4, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    two = one.roll(1, 0)
    assert perception.distance(one, one.clone(), slots).tolist() == [0, 0, 0]
    one.requires_grad_()
    two = two.detach().requires_grad_()
    perception.distance(one, two, slots).sum().backward()
    assert two.grad is None
    pulled = one.grad.abs().sum(1) > 0
    assert pulled.flatten(1).any(1).all()
    assert pulled.all() == (crop == 1) and pulled.double().mean() <= (1 if crop == 1 else 0.45)
    tokens = seen(crop, features=load_features("dinov2-small", source=str(tiny_dinov2(tmp_path / "dinov2"))).double())
    assert tokens.distance(one.detach(), one.detach().clone(), slots).tolist() == [0, 0, 0]
    assert (tokens.distance(one.detach(), two.detach(), slots) > 0).all()


def anchoring(method, perceptual: float) -> Anchoring:
    return Anchoring(
        method.model, method.student, method.players[STUDENT].module, some_anchors(), StudentRecipe(),
        OptimizerSettings(1e-3), emphasis=1.0,
        perception=method.perception, perceptual=perceptual,
    )  # fmt: skip


def learn(alone: Anchoring, micro_batch_size: int | None = None) -> Trainer:
    trainer = Trainer(alone, TrainSettings(16, 8, micro_batch_size))
    for _ in trainer.run(lambda slot: anchor_batches(some_anchors(), slot, 16, 8)):
        pass
    return trainer


def test_it_is_added_with_its_weight():
    method = tiny_add(kind="v_prediction", zero_snr=True)
    (batch,) = anchor_batches(some_anchors(), 0, 6, 6)
    losses = {}
    for weight in (0.0, 3.0):
        alone = anchoring(method, weight)
        rollout = alone.rollout(batch, frozenset({STUDENT}))
        losses[weight] = alone.loss(STUDENT, rollout)
    drawn, lesson = rollout
    plain = anchor_loss(drawn, lesson.target, lesson.worded, 6, emphasis=1.0).item()
    looked = method.perception.distance(drawn, lesson.target, batch.slots).mean().item()
    assert looked > 0 and "perceptual" not in losses[0.0].terms
    assert losses[0.0].total.item() == pytest.approx(plain)
    assert losses[3.0].total.item() == pytest.approx(plain + 3 * looked)
    assert losses[3.0].terms["perceptual"].item() == pytest.approx(looked)


def test_beside_add_it_is_a_part_of_the_anchors_loss():
    """Two anchors to four pictures; which, and where they are looked at, their slots say."""

    def terms(*overrides: str) -> dict[str, float]:
        method = tiny_add(
            "anchors.count=5", "anchors.every=2", "anchors.weight=7", "discriminator.crop=0.5", *overrides,
            kind="v_prediction", zero_snr=True,
        )  # fmt: skip
        method.anchors = some_anchors()
        rollout = method.rollout(tiny_batch(), frozenset(method.players))
        loss = method.loss(STUDENT, rollout)
        drawn, lesson, _ = rollout.anchored
        assert lesson.slots.tolist() == [0, 2]
        seen = method.perception.distance(drawn, lesson.target, torch.tensor([0, 2])).mean().item()
        return {name: value.item() for name, value in {"total": loss.total, **loss.terms}.items()} | {"seen": seen}

    without, beside = terms(), terms("anchors.perceptual=3")
    assert "perceptual" not in without and beside["perceptual"] == pytest.approx(beside["seen"])
    assert beside["total"] == pytest.approx(without["total"] + 7 * 3 * beside["seen"]) and beside["seen"] > 0


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_parts_of_a_batch_add_up_to_its_gradient(micro_batch_size):
    def weights(size: int | None) -> list[torch.Tensor]:
        alone = anchoring(tiny_add(kind="v_prediction", zero_snr=True), 3.0)
        for _ in Trainer(alone, TrainSettings(16, 8, size)).run(
            lambda slot: anchor_batches(some_anchors(), slot, 16, 8)
        ):
            pass
        return list(alone.players[STUDENT].module.parameters())

    for one, other in zip(weights(None), weights(micro_batch_size), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.usefixtures("two_threads")
def test_threads_that_share_a_batch_see_through_the_same_networks():
    alone = anchoring(tiny_add(kind="v_prediction", zero_snr=True), 3.0)
    trainer = learn(alone)
    assert len(trainer.views.made) == 2
    for view in trainer.views.made:
        mine, its = (next(one.perception.features.buffers()) for one in (alone, view))
        assert mine.data_ptr() == its.data_ptr() and view.perception.features is not alone.perception.features
