"""A step whose batch several threads share: the gradients of one, and the same each time."""

import threading

import pytest
import torch
from duels import assert_identical
from pipelines import tiny_sdxl
from test_anchors import some_anchors
from tiny_runs import endless, tiny_add, tiny_batch, tiny_trainer

from onestroke.distill.add import DISCRIMINATOR, STUDENT
from onestroke.distill.anchors import Anchoring
from onestroke.distill.denoising import Denoising, DenoisingSettings
from onestroke.embedded.judge import NOTHING
from onestroke.embedded.naming import PictureNaming, TextNaming
from onestroke.families.load import from_pipeline
from onestroke.train.method import Method, OptimizerSettings
from onestroke.train.trainer import Trainer, TrainSettings
from onestroke.train.views import view_of
from onestroke.types import Batch

VALUES = {"hair": (NOTHING, "bob", "bun")}
OPTIMIZER = OptimizerSettings(1e-3)
pytestmark = pytest.mark.usefixtures("two_threads")


def labels_of(slots: torch.Tensor) -> torch.Tensor:
    return slots[:, None] % 3


def denoising() -> Method:
    model = from_pipeline(tiny_sdxl().to(torch.float64))
    hint = PictureNaming(model.unet.config.block_out_channels[-1], VALUES, labels_of)
    hint.module.double()
    model.unet.mid_block.register_forward_hook(lambda block, given, output: SEEN.add(threading.get_ident()))
    return Denoising(model, DenoisingSettings(OPTIMIZER), hint=hint, emphasis=lambda slots: slots[:, None, None] * 0.1)


def naming() -> Method:
    method = TextNaming(from_pipeline(tiny_sdxl().to(torch.float64)), OPTIMIZER, VALUES, labels_of)
    method.heads.double()
    return method


def anchoring() -> Method:
    add = tiny_add()
    module = add.players[STUDENT].module
    anchors = some_anchors(side=16)
    return Anchoring(add.model, add.student, module, anchors, add.recipe.student, OPTIMIZER, emphasis=1.0)


METHODS = {
    "add": tiny_add,
    "add in pixels, with R1 in every step": lambda: tiny_add("losses.distance=pixel", "losses.r1_every=1"),
    "add of a part of the picture": lambda: tiny_add("discriminator.crop=0.5", "discriminator.real=reconstructed"),
    "add of Stable Diffusion": lambda: tiny_add(family="sd", kind="v_prediction", zero_snr=True),
    "add with gradient checkpointing": lambda: tiny_add("student.gradient_checkpointing=true"),
    "a LoRA student": lambda: tiny_add("student.lora.rank=2"),
    "anchors": anchoring,
    "a teacher": denoising,
    "text encoders": naming,
}
SEEN: set[int] = set()


def batch() -> Batch:
    """Nine pictures, which two threads share as five and four; latents for who takes those."""
    pictures = tiny_batch(9)
    latents = torch.randn(9, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Batch(pictures.images, pictures.captions, pictures.slots, pictures.sizes, latents, (32, 32))


def gradients(name: str, *, divided: bool) -> tuple[dict, dict]:
    torch.manual_seed(0)  # of heads
    trainer, terms = Trainer(METHODS[name](), TrainSettings(100, 9)), {}
    torch.set_num_threads(1 + divided)
    players = trainer.method.players
    trainer._backward(batch(), frozenset(players), 1.0, terms)
    trainer.views.give_gradients(players)
    assert len(trainer.views.made) == 2 * divided
    found = {f"{n}/{key}": p.grad for n, one in players.items() for key, p in one.module.named_parameters()}
    return found, terms


@pytest.mark.parametrize("name", METHODS)
def test_gradients_and_terms_are_those_of_one_thread(name):
    shared, their_terms = gradients(name, divided=True)
    alone, terms = gradients(name, divided=False)
    assert any(g is not None and g.abs().max() > 0 for g in alone.values())
    assert {key for key, g in shared.items() if g is None} == {key for key, g in alone.items() if g is None}
    for key, gradient in alone.items():
        if gradient is not None:
            torch.testing.assert_close(shared[key], gradient, atol=1e-10 if "add" in name else 1e-7, rtol=1e-5)
    assert their_terms.keys() == terms.keys()
    torch.testing.assert_close(their_terms, terms, atol=1e-10, rtol=1e-6)  # shares are in float32


def test_two_threads_work_and_none_is_the_one_that_asked():
    SEEN.clear()
    gradients("a teacher", divided=True)
    assert len(SEEN) == 2 and threading.get_ident() not in SEEN


def steps(count: int, *, divided: bool = True) -> Trainer:
    trainer = tiny_trainer("train.batch_size=8", "losses.r1_every=2", "train.num_images=800")
    torch.set_num_threads(1 + divided)
    for _, _ in zip(range(count), trainer.run(endless(8)), strict=False):
        pass
    return trainer


def test_micro_batches_are_not_divided():
    whole, parts = (tiny_trainer("train.batch_size=16", *lines) for lines in ((), ("train.micro_batch_size=8",)))
    assert (whole.views.count(16), parts.views.count(8)) == (2, 1)


def test_views_follow_what_optimizers_and_spectral_norm_write():
    shared, alone = steps(4), steps(4, divided=False)
    for name in (STUDENT, DISCRIMINATOR):
        ours, theirs = (t.method.players[name].module.state_dict() for t in (shared, alone))
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, atol=1e-7, rtol=1e-5)
    assert_identical(shared.state(), steps(4).state())  # and each time the same


def test_a_view_shares_every_weight_and_no_gradient():
    method = tiny_add()
    view = view_of(method)
    for name, player in method.players.items():
        ours, theirs = player.module.state_dict(), view.players[name].module.state_dict()
        assert view.players[name].module is not player.module and ours.keys() == theirs.keys()
        assert all(value.data_ptr() == theirs[key].data_ptr() for key, value in ours.items())
    for mine, other in zip(method.frozen, view.frozen, strict=True):
        assert all(a is b for a, b in zip(mine.parameters(), other.parameters(), strict=True))
    view.players[STUDENT].module.requires_grad_(False)
    assert all(p.requires_grad for p in method.players[STUDENT].module.parameters())
    assert view.model.tokenizers[0] is not method.model.tokenizers[0]
    one = anchoring()
    assert view_of(one).anchors is one.anchors  # what may be gigabytes


def test_few_pictures_are_not_divided_nor_what_processes_share_or_is_compiled(monkeypatch):
    trainer = tiny_trainer()
    assert [trainer.views.count(rows) for rows in (1, 7, 8, 16)] == [1, 1, 2, 2]
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        assert trainer.views.count(16) == 1
    trainer.method.model.unet.mid_block.compile()
    assert trainer.views.count(16) == 1


def test_what_fails_in_a_thread_reaches_who_asked_and_nothing_changed():
    trainer = tiny_trainer("train.batch_size=8")
    next(trainer.run(endless(8)))
    before = {key: value.clone() for key, value in trainer.method.heads.state_dict().items()}

    def fail(*args):
        raise MemoryError("no room")

    trainer.views.made[1].loss = fail
    with pytest.raises(MemoryError, match="no room"):
        next(trainer.run(endless(8)))
    assert all(torch.equal(value, before[key]) for key, value in trainer.method.heads.state_dict().items())
