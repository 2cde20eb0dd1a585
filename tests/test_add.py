"""Adversarial Diffusion Distillation on tiny pipelines: who learns from what."""

import pytest
import torch
from diffusers import DDIMScheduler
from tiny_runs import Spy, tiny_add, tiny_batch, tiny_recipe, tiny_trainer
from torch import nn

from onestroke.distill.add import ADD, DISCRIMINATOR, STUDENT
from onestroke.distill.student import choose_timesteps
from onestroke.distill.teacher import teacher_timesteps
from onestroke.randomness import normal, stratified
from onestroke.sample import student_scheduler
from onestroke.schedule import student_timesteps
from onestroke.train.optimizers import Muon

BOTH = frozenset({STUDENT, DISCRIMINATOR})


def gradients(module: nn.Module) -> list:
    return [parameter.grad for parameter in module.parameters()]


def largest(module: nn.Module) -> float:
    return max((g.abs().max().item() for g in gradients(module) if g is not None), default=0.0)


def frozen_parts(method: ADD) -> tuple[nn.Module, ...]:
    return method.model.unet, method.model.vae, *method.model.text_encoders, method.features


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def has_changed(module: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(value, before[name]) for name, value in module.named_parameters())


def count_calls(module: nn.Module) -> list[int]:
    """The batch sizes that `module` is called with from now on."""
    sizes: list[int] = []
    module.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    return sizes


# --- who learns from what ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("due", [frozenset({STUDENT}), BOTH], ids=["alone", "with the discriminator"])
def test_the_students_loss_reaches_every_weight_of_the_student_and_nothing_frozen(due):
    trainer = tiny_trainer()
    trainer._backward(tiny_batch(), due, 1.0, {})
    method = trainer.method
    assert all(g is not None and g.isfinite().all() for g in gradients(method.players[STUDENT].module))
    assert largest(method.players[STUDENT].module) > 0
    for part in frozen_parts(method):
        assert all(g is None for g in gradients(part))
    if due != BOTH:
        assert all(g is None for g in gradients(method.heads))


def test_the_discriminators_loss_reaches_every_weight_of_the_heads_and_nothing_else():
    trainer = tiny_trainer()
    trainer._backward(tiny_batch(), frozenset({DISCRIMINATOR}), 1.0, {})
    assert all(g is not None and g.isfinite().all() for g in gradients(trainer.method.heads))
    for part in (trainer.method.players[STUDENT].module, *frozen_parts(trainer.method)):
        assert all(g is None for g in gradients(part))


def test_each_players_gradient_is_the_same_whether_or_not_the_other_is_due():
    """A leak of one player's loss into the other's weights would show as a difference."""
    together, student, heads = (tiny_trainer() for _ in range(3))
    together._backward(tiny_batch(), BOTH, 1.0, {})
    student._backward(tiny_batch(), frozenset({STUDENT}), 1.0, {})
    heads._backward(tiny_batch(), frozenset({DISCRIMINATOR}), 1.0, {})
    for name, alone in ((STUDENT, student), (DISCRIMINATOR, heads)):
        for one, two in zip(
            gradients(together.method.players[name].module), gradients(alone.method.players[name].module), strict=True
        ):
            torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-9)


def test_the_adversarial_term_alone_moves_the_student():
    trainer = tiny_trainer("losses.distill_weight=0")
    trainer._backward(tiny_batch(), BOTH, 1.0, {})
    assert largest(trainer.method.players[STUDENT].module) > 1e-6


def test_the_distillation_term_alone_moves_the_student():
    trainer = tiny_trainer("losses.adversarial_weight=0")
    trainer._backward(tiny_batch(), BOTH, 1.0, {})
    assert largest(trainer.method.players[STUDENT].module) > 1e-6


def test_the_students_loss_is_eq_1_of_the_papers_terms():
    method = tiny_add("losses.distill_weight=0.7")
    rollout = method.rollout(tiny_batch(), BOTH)
    loss = method.loss(STUDENT, rollout)
    logits = method.heads(rollout.fake, rollout.c_text, rollout.c_img, rollout.has_image)
    error = (rollout.x0 - rollout.target.x0).square().mean(dim=(1, 2, 3))
    distillation = (rollout.target.alpha_t.flatten() * error).mean()
    torch.testing.assert_close(loss.total, -sum(head.mean() for head in logits) + 0.7 * distillation)
    torch.testing.assert_close(loss.terms["distillation"], distillation.detach())


def test_updates_are_simultaneous_each_loss_at_the_steps_starting_weights():
    trainer, copy = tiny_trainer(), tiny_trainer()
    batch, method = tiny_batch(), copy.method
    trainer._step(batch)

    rollout = method.rollout(batch, BOTH)
    expected = {}
    for name in (DISCRIMINATOR, STUDENT):
        parameters = list(method.players[name].module.parameters())
        expected[name] = torch.autograd.grad(method.loss(name, rollout).total, parameters, retain_graph=True)
    for name, grads in expected.items():
        parameters = list(method.players[name].module.parameters())
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad * min(1.0, 1 / (norm.item() + 1e-6))
        torch.optim.AdamW(parameters, lr=1e-3, betas=(0.0, 0.99), eps=1e-8, weight_decay=0.0).step()
        for one, two in zip(trainer.method.players[name].module.parameters(), parameters, strict=True):
            torch.testing.assert_close(one, two, atol=1e-9, rtol=1e-7)

    # one after the other would be something else: the student's loss under heads that have already stepped
    other = tiny_trainer().method
    parameters = list(other.players[STUDENT].module.parameters())
    other.heads.load_state_dict(method.heads.state_dict())
    late = torch.autograd.grad(other.loss(STUDENT, other.rollout(batch, BOTH)).total, parameters)
    assert max((a - b).abs().max().item() for a, b in zip(late, expected[STUDENT], strict=True)) > 1e-6


# --- the student's input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_student_trains_at_the_exported_schedulers_timesteps_and_no_others(steps):
    method = tiny_add(f"student.num_timesteps={steps}")
    method.student = spy = Spy(nn.Identity())
    spy.denoiser.forward = lambda x_t, t, condition: x_t
    method.rollout(tiny_batch(32, size=8), frozenset({DISCRIMINATOR}))
    scheduler = student_scheduler(method.model.scheduler_config)
    scheduler.set_timesteps(steps)
    assert set(spy.asked[0][1].tolist()) == set(scheduler.timesteps.int().tolist()) == set(student_timesteps(steps))


def test_timesteps_are_uniform_unless_weighted():
    recipe = tiny_recipe().student
    fractions = torch.tensor([0.0, 0.24, 0.26, 0.49, 0.51, 0.74, 0.76, 0.999]).double()
    chosen = choose_timesteps(fractions, recipe, num_train_timesteps=1000)
    assert chosen.tolist() == [999, 999, 749, 749, 499, 499, 249, 249]
    weighted = tiny_recipe("student.timestep_weights=[4, 3, 2, 1]").student
    fractions = torch.tensor([0.39, 0.41, 0.69, 0.71, 0.89, 0.91]).double()  # edges 0.4, 0.7, 0.9
    chosen = choose_timesteps(fractions, weighted, num_train_timesteps=1000)
    assert chosen.tolist() == [999, 749, 749, 499, 499, 249]


@pytest.mark.parametrize(("kind", "zero_snr"), [("epsilon", False), ("v_prediction", True)])
def test_at_the_last_timestep_and_only_there_the_students_picture_owes_nothing_to_the_real_one(kind, zero_snr):
    method = tiny_add(kind=kind, zero_snr=zero_snr)
    batch = tiny_batch(8)
    other = tiny_batch(8, first=100)
    swapped = type(batch)(other.images, batch.captions, batch.slots, batch.sizes)
    method.student = spy = Spy(method.student)
    with torch.no_grad():
        one, two = (method.rollout(b, frozenset({DISCRIMINATOR})) for b in (batch, swapped))
    is_last = spy.asked[0][1] == 999
    assert 0 < is_last.sum() < 8
    same = (one.x0 - two.x0).abs().amax(dim=(1, 2, 3)) == 0
    assert torch.equal(same, is_last)
    assert torch.equal(one.has_image, ~is_last)  # nor does the discriminator condition on an image there


def test_random_numbers_depend_on_the_picture_alone_not_on_its_place_in_the_batch():
    method = tiny_add()
    with torch.no_grad():
        whole = method.rollout(tiny_batch(4), BOTH)
        part = method.rollout(tiny_batch(2, first=2), BOTH)
    torch.testing.assert_close(whole.x0[2:], part.x0, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(whole.target.x0[2:], part.target.x0, atol=1e-9, rtol=1e-7)


# --- the teacher's target ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind", "zero_snr"), [
    ("sdxl", "epsilon", False), ("sd", "v_prediction", False), ("sdxl", "v_prediction", True),
])  # fmt: skip
def test_the_target_is_one_guided_teacher_step_as_diffusers_would_take_it(family, kind, zero_snr):
    method = tiny_add("losses.distance=latent", "teacher.guidance=[4, 4]", family=family, kind=kind, zero_snr=zero_snr)
    batch, model = tiny_batch(2), method.model
    rollout = method.rollout(batch, BOTH)
    t = teacher_timesteps(stratified(0, "t", batch.slots), method.recipe.teacher, num_train_timesteps=1000)
    eps = normal(rollout.x0.shape[1:], 0, "teacher eps", batch.slots).double()
    scheduler = DDIMScheduler.from_config(model.scheduler_config, clip_sample=False)
    x_t = scheduler.add_noise(rollout.x0.detach(), eps, t)
    scheduler.set_timesteps(1000)
    with torch.no_grad():
        condition = model.with_sizes(model.encode_prompts(batch.captions), batch.sizes, (32, 32))
        outputs = [
            model.family.call_unet(model.unet, x_t, t, c) for c in (condition, model.blank_prompts(condition))
        ]  # fmt: skip
    output = outputs[1] + 4 * (outputs[0] - outputs[1])
    for i in range(2):
        expected = scheduler.step(output[i : i + 1], int(t[i]), x_t[i : i + 1]).pred_original_sample
        torch.testing.assert_close(rollout.target.x0[i : i + 1], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        rollout.target.alpha_t.flatten(), scheduler.alphas_cumprod[t].sqrt().double(), atol=1e-6, rtol=1e-5
    )


def test_the_target_changes_with_the_guidance_as_guidance_does():
    """x0 is affine in the scale: the target at 7 follows from those at 1 and 3."""
    targets = {}
    for scale in (1, 3, 7):
        method = tiny_add("losses.distance=latent", f"teacher.guidance=[{scale}, {scale}]")
        targets[scale] = method.rollout(tiny_batch(2), BOTH).target.x0
    assert (targets[3] - targets[1]).abs().max() > 1e-3
    torch.testing.assert_close(targets[7], targets[1] + 3 * (targets[3] - targets[1]), atol=1e-9, rtol=1e-7)


def test_a_range_of_guidance_draws_each_picture_its_own_scale_within_it():
    method = tiny_add("losses.distance=latent", "teacher.guidance=[3, 7]")
    drawn, low, high = (
        m.rollout(tiny_batch(4), BOTH).target.x0
        for m in (method, tiny_add("losses.distance=latent", "teacher.guidance=[3, 3]"),
                  tiny_add("losses.distance=latent", "teacher.guidance=[7, 7]"))
    )  # fmt: skip
    shares = ((drawn - low) * (high - low)).sum(dim=(1, 2, 3)) / (high - low).square().sum(dim=(1, 2, 3))
    assert ((shares > 0) & (shares < 1)).all() and shares.unique().numel() == 4
    torch.testing.assert_close(drawn, low + shares.reshape(-1, 1, 1, 1) * (high - low), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize(("line", "sizes"), [
    ("teacher.guidance=[3, 3]", [8]), ("teacher.guidance=[1, 1]", [4]), ("losses.weighting=nfsd", [4, 4, 4]),
    ("losses.distill_weight=0", []),
])  # fmt: skip
def test_one_step_asks_the_teacher_once_and_the_student_once_for_both_players(line, sizes):
    trainer = tiny_trainer(line)
    teacher, student = count_calls(trainer.method.model.unet), count_calls(trainer.method.players[STUDENT].module)
    features = count_calls(trainer.method.features.backbone)
    trainer._step(tiny_batch())
    assert teacher == sizes  # guided: the prompt and its blank in one call; NFSD needs three
    assert student == [4] and features == [4, 4]  # of the student's pictures and of the real ones


def test_a_step_of_the_discriminator_alone_asks_no_teacher():
    trainer = tiny_trainer("student_optimizer.every=2")
    trainer._step(tiny_batch())
    teacher = count_calls(trainer.method.model.unet)
    trainer._step(tiny_batch(first=4))
    assert teacher == []


def test_distances_and_weightings_all_run_and_all_differ():
    method, values = tiny_add(), {}
    for distance in ("pixel", "latent"):
        for weighting in ("exponential", "sds", "nfsd"):
            method.recipe = tiny_recipe(f"losses.distance={distance}", f"losses.weighting={weighting}")
            rollout = method.rollout(tiny_batch(2), frozenset({STUDENT}))
            shape = (2, 3, 32, 32) if distance == "pixel" else (2, 4, 8, 8)
            assert rollout.x0.shape == rollout.target.x0.shape == shape
            values[distance, weighting] = method.loss(STUDENT, rollout).terms["distillation"].item()
    assert all(0 < value < float("inf") for value in values.values())
    assert len({round(value, 12) for value in values.values()}) == 6


# --- the discriminator ------------------------------------------------------------------------------------------------


class LinearHeads(nn.Module):
    """Head k's logit at a position is the inner product of a weight of ones, times k + 1, with the feature there."""

    uses_text = uses_image = False

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.full((w,), k + 1.0).double()) for k, w in enumerate(widths))

    def forward(self, features, *conditions):
        return [torch.einsum("bchw,c->bhw", f, w).flatten(1) for f, w in zip(features, self.weights, strict=True)]


def test_r1_is_on_by_default_and_has_the_size_worked_out_by_hand():
    """d(sum of logits)/d(feature) is the weight at each position: gamma * positions * width * weight^2 for each head.

    32 px: 8 x 8 positions of width 8 with weight 1, and 4 x 4 of width 16 with weight 2.
    """
    method = tiny_add()
    method.heads = LinearHeads((8, 16))
    loss = method.loss(DISCRIMINATOR, method.rollout(tiny_batch(2), BOTH))
    penalty = 1e-5 * (64 * 8 * 1 + 16 * 16 * 4)
    assert loss.terms["r1"].item() == pytest.approx(penalty, rel=1e-9)
    assert (loss.total - loss.terms["hinge"]).item() == pytest.approx(penalty, rel=1e-6)


def test_r1_teaches_the_heads_and_can_be_switched_off():
    grads = {}
    for gamma in (0, 1):
        method = tiny_add(f"losses.r1_gamma={gamma}")
        method.heads = LinearHeads((8, 16))
        loss = method.loss(DISCRIMINATOR, method.rollout(tiny_batch(2), BOTH))
        assert ("r1" in loss.terms) == bool(gamma)
        grads[gamma] = torch.autograd.grad(loss.total, list(method.heads.parameters()))
    for k, positions in enumerate((64, 16)):  # d/dw of positions * ||w||^2 = 2 * positions * w
        torch.testing.assert_close(grads[1][k] - grads[0][k], torch.full_like(grads[0][k], 2 * positions * (k + 1.0)))


def test_a_lazy_r1_comes_every_nth_step_n_times_as_strong_whatever_the_micro_batches():
    """The penalty of the hand-worked test above; steps of 4 pictures, seen 2 at a time."""
    method = tiny_add("losses.r1_every=3")
    method.heads = LinearHeads((8, 16))
    penalty = 3e-5 * (64 * 8 * 1 + 16 * 16 * 4)
    for step in range(6):
        for half in (0, 2):
            batch = tiny_batch(2, first=4 * step + half)
            terms = method.loss(DISCRIMINATOR, method.rollout(batch, BOTH)).terms
            assert ("r1" in terms) == (step % 3 == 0)
            if "r1" in terms:
                assert terms["r1"].item() == pytest.approx(penalty, rel=1e-9)


def test_a_lazy_r1_counts_the_heads_own_steps():
    """Heads due in steps 0, 2, 4, 6: the penalty comes in every second of those."""
    method = tiny_add("losses.r1_every=2", "discriminator_optimizer.every=2")
    method.heads = LinearHeads((8, 16))
    found = [method.rollout(tiny_batch(2, first=4 * step), BOTH).r1_gamma for step in (0, 2, 4, 6)]
    assert found == [2e-5, 0.0, 2e-5, 0.0]


def test_real_pictures_can_be_shown_as_the_vae_decodes_them():
    batch = tiny_batch(2)
    shown = {kind: tiny_add(f"discriminator.real={kind}").rollout(batch, BOTH) for kind in ("data", "reconstructed")}
    method = tiny_add()
    with torch.no_grad():
        decoded = method.model.decode_latents(method.model.encode_images(batch.images))
        for kind, pictures in (("data", batch.images), ("reconstructed", decoded)):
            for found, expected in zip(shown[kind].real, method.features(pictures), strict=True):
                torch.testing.assert_close(found, expected)
            torch.testing.assert_close(shown[kind].c_img, method.features.embed(pictures))
    assert not torch.allclose(shown["data"].real[0], shown["reconstructed"].real[0])


def test_the_features_are_shown_a_part_at_each_pictures_own_place():
    method, whole = tiny_add("discriminator.crop=0.5"), tiny_add()
    images = torch.arange(2 * 3 * 32 * 32).double().reshape(2, 3, 32, 32).requires_grad_()
    slots, latents = torch.tensor([0, 1]), torch.zeros(2, 4, 8, 8)
    parts = method._real(images, latents, slots)
    assert parts.shape == (2, 3, 16, 16) and whole._real(images, latents, slots) is images
    corners = [divmod(int(part[0, 0, 0]) % 1024, 32) for part in parts]
    for part, image, (top, left) in zip(parts, images, corners, strict=True):
        assert torch.equal(part, image[:, top : top + 16, left : left + 16])
    assert corners[0] != corners[1]
    assert torch.equal(method._real(images[1:], latents[1:], slots[1:]), parts[1:])  # whatever it is batched with
    parts.sum().backward()
    assert images.grad.sum() == parts.numel() and images.grad.max() == 1
    places = torch.stack(
        [method._real(images[:1], latents[:1], torch.tensor([s]))[0, 0, 0, 0] for s in range(300)]
    ).long()
    assert (places // 32 % 32).unique().tolist() == (places % 32).unique().tolist() == list(range(17))


def test_cropped_fake_and_real_pictures_reach_the_heads():
    method = tiny_add("discriminator.crop=0.5")
    sizes = []
    method.features.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(inputs[0].shape[-2:])))
    rollout = method.rollout(tiny_batch(2), BOTH)
    assert (16, 16) in sizes and {tuple(f.shape[-2:]) for f in (rollout.fake[0], rollout.real[0])} == {(4, 4)}


def test_a_player_can_be_trained_by_muon():
    for kind, found in (("adamw", torch.optim.AdamW), ("muon", Muon)):
        trainer = tiny_trainer(f"student_optimizer.kind={kind}")
        assert type(trainer.optimizers[STUDENT]) is found
        assert type(trainer.optimizers[DISCRIMINATOR]) is torch.optim.AdamW


def test_the_discriminators_loss_is_hinge_on_real_and_fake_plus_r1():
    method = tiny_add()
    rollout = method.rollout(tiny_batch(2), BOTH)
    loss = method.loss(DISCRIMINATOR, rollout)
    conditions = (rollout.c_text, rollout.c_img, rollout.has_image)
    with torch.no_grad():
        real, fake = method.heads(rollout.real, *conditions), method.heads(rollout.fake, *conditions)
        expected = sum((1 - r).clamp(min=0).mean() for r in real) + sum((1 + f).clamp(min=0).mean() for f in fake)
    assert loss.terms["hinge"].item() == pytest.approx(expected.item())
    assert loss.total.item() == pytest.approx(expected.item() + loss.terms["r1"].item())
    assert loss.terms["r1"] > 0 and loss.terms["real_0"].item() == pytest.approx(real[0].mean().item())


@pytest.mark.parametrize("family", ["sdxl", "sd"])
@pytest.mark.parametrize("conditioning", ["none", "text", "image", "both"])
def test_the_discriminator_is_told_the_caption_and_the_real_picture_as_the_recipe_says(conditioning, family):
    method = tiny_add(f"discriminator.conditioning={conditioning}", family=family)
    batch = tiny_batch(2)
    rollout = method.rollout(batch, BOTH)
    with torch.no_grad():
        condition = method.model.encode_prompts(batch.captions)
        caption = condition.text.mean(dim=1) if family == "sd" else condition.pooled
        picture = method.features.embed(batch.images.double())
    for given, wanted, name in ((rollout.c_text, caption, "text"), (rollout.c_img, picture, "image")):
        if conditioning in (name, "both"):
            torch.testing.assert_close(given.double(), wanted.double(), atol=1e-6, rtol=1e-5)
        else:
            assert given is None
    assert all(method.loss(player, rollout).total.isfinite() for player in BOTH)


def test_spectral_norm_advances_once_a_step_of_the_heads_whatever_the_micro_batches(monkeypatch):
    trainer = tiny_trainer("train.micro_batch_size=1", "discriminator_optimizer.every=2")
    calls = []
    advance = trainer.method.heads.advance_spectral_norm
    monkeypatch.setattr(trainer.method.heads, "advance_spectral_norm", lambda: (calls.append(trainer.step), advance()))
    for first in (0, 4, 8):
        trainer._step(tiny_batch(first=first))
    assert calls == [0, 2]


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    trainers = [tiny_trainer(f"train.micro_batch_size={size}") for size in ("null", 1, 3)]  # 3: parts of 3 and 1
    terms = [trainer._step(tiny_batch()) for trainer in trainers]
    for trainer, term in zip(trainers[1:], terms[1:], strict=True):
        assert term.keys() == terms[0].keys()
        for key in ("student/loss", "discriminator/loss", "student/grad_norm", "discriminator/grad_norm",
                    "discriminator/r1", "student/distillation"):  # fmt: skip
            assert term[key] == pytest.approx(terms[0][key], rel=1e-6), key
        for name in BOTH:
            for one, two in zip(
                trainer.method.players[name].module.parameters(),
                trainers[0].method.players[name].module.parameters(), strict=True,
            ):  # fmt: skip
                torch.testing.assert_close(one, two, atol=1e-5, rtol=0)  # the step itself is 1e-3


def test_every_player_steps_only_when_it_is_due():
    trainer = tiny_trainer("discriminator_optimizer.every=3", "student_optimizer.every=2")
    stepped = {STUDENT: [], DISCRIMINATOR: []}
    for step in range(4):
        before = {name: snapshot(player.module) for name, player in trainer.method.players.items()}
        terms = trainer._step(tiny_batch(2, first=2 * step))
        for name, player in trainer.method.players.items():
            changed = has_changed(player.module, before[name])
            assert changed == (f"{name}/loss" in terms)
            stepped[name] += [step] * changed
    assert stepped == {STUDENT: [0, 2], DISCRIMINATOR: [0, 3]}
