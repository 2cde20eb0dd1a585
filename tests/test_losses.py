"""The losses of ADD against numbers worked by hand."""

import pytest
import torch

from onestroke.distill.losses import (
    adversarial_loss,
    distillation_loss,
    distillation_weight,
    hinge_loss,
    nfsd_target,
    r1_features,
    r1_penalty,
    student_loss,
)

ONE_HEAD = [[1.0, 3.0], [0.0, 0.0]]  # 2 pictures, 2 positions: mean 1
OTHER_HEAD = [[-0.5], [1.5]]  # 1 position: mean 1/2


def heads(*values: list, requires_grad: bool = False) -> list[torch.Tensor]:
    return [torch.tensor(v, dtype=torch.float64, requires_grad=requires_grad) for v in values]


def test_adversarial_loss_sums_heads_and_averages_positions():
    logits = heads(ONE_HEAD, OTHER_HEAD, requires_grad=True)
    loss = adversarial_loss(logits)
    loss.backward()
    assert loss.item() == pytest.approx(-(1 + 0.5))
    assert logits[0].grad.tolist() == [[-0.25, -0.25], [-0.25, -0.25]]  # 4 logits share the head's mean
    assert logits[1].grad.tolist() == [[-0.5], [-0.5]]


def test_hinge_loss_matches_hand_computation():
    real, fake = heads(ONE_HEAD, OTHER_HEAD), heads([[-2.0, 0.0]], [[0.5]])
    # real: (0 + 0 + 1 + 1) / 4 and (1.5 + 0) / 2; fake: (0 + 1) / 2 and 1.5
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 + 0.75 + 0.5 + 1.5)


def test_hinge_loss_of_an_undecided_discriminator_is_two_per_head():
    zeros = heads([[0.0, 0.0]], [[0.0]])
    assert hinge_loss(zeros, zeros).item() == 4


def test_hinge_loss_stops_pushing_what_is_beyond_the_margin():
    real, fake = heads([[2.0, 0.0]], requires_grad=True), heads([[-2.0, 0.0]], requires_grad=True)
    hinge_loss(real, fake).backward()
    assert real[0].grad.tolist() == [[0.0, -0.5]] and fake[0].grad.tolist() == [[0.0, 0.5]]


def linear_heads() -> tuple[list, list, torch.Tensor]:
    """Two heads, each a weight times its features: 2 pictures, 3 tokens of width 2, and 1 map of width 1."""
    weight = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    features = r1_features([torch.randn(2, 3, 2).double(), torch.randn(2, 1, 2, 2).double()])
    logits = [features[0] @ weight, 2 * weight[0] * features[1].flatten(1)]
    return logits, features, weight


def test_r1_is_the_squared_gradient_of_each_pictures_summed_logits():
    logits, features, _ = linear_heads()
    # Head 1: each of 3 tokens has gradient (3, 4), squared norm 25. Head 2: each of 4 positions has 2 * 3, squared 36.
    assert r1_penalty(logits, features, gamma=1.0).item() == pytest.approx(3 * 25 + 4 * 36)
    assert r1_penalty(*linear_heads()[:2]).item() == pytest.approx(1e-5 * 219)


def test_r1_is_not_that_of_a_mean_nor_of_the_hinge_loss():
    """What others got wrong: through means the penalty is many orders too small, and through the hinge it can be 0."""
    logits, features, _ = linear_heads()
    mean = sum(head.mean() for head in logits)
    gradients = torch.autograd.grad(mean, features, retain_graph=True)
    of_the_mean = sum(g.square().flatten(1).sum(1).mean() for g in gradients)
    ours = r1_penalty(logits, features, gamma=1.0)
    assert of_the_mean.item() == pytest.approx(75 / 6**2 + 144 / 8**2)
    assert ours > 30 * of_the_mean
    sure = [head * 0 + 5 + (head - head.detach()) for head in logits]  # logits of 5: beyond the margin
    assert r1_penalty(sure, features, gamma=1.0).item() == pytest.approx(219)
    hinged = torch.autograd.grad(sum((1 - head).relu().mean() for head in sure), features)
    assert all(g.abs().max() == 0 for g in hinged)


def test_r1_trains_the_heads_through_its_double_backward():
    logits, features, weight = linear_heads()
    r1_penalty(logits, features, gamma=1.0).backward()
    # 3 (w0^2 + w1^2) + 4 (2 w0)^2: derivative 6 w0 + 32 w0 and 6 w1
    assert weight.grad.tolist() == pytest.approx([38 * 3, 6 * 4])


def test_r1_does_not_depend_on_the_batch_size():
    logits, features, weight = linear_heads()
    one = r1_features([f[:1] for f in features])
    of_one = r1_penalty([one[0] @ weight, 2 * weight[0] * one[1].flatten(1)], one)
    assert of_one.item() == pytest.approx(r1_penalty(logits, features).item())


def test_r1_counts_only_the_heads_own_features_when_layers_build_on_each_other():
    shallow = torch.randn(1, 2, 2, dtype=torch.float64, requires_grad=True)
    deep = 10 * shallow  # connected in the graph: head 2's gradient must not reach the shallow feature's penalty
    assert r1_penalty([shallow.sum(-1), deep.sum(-1)], [shallow, deep], gamma=1.0).item() == pytest.approx(4 + 4)


def test_r1_features_cut_the_graph():
    image = torch.ones(1, 2, requires_grad=True)
    (feature,) = r1_features([image * 2])
    assert feature.is_leaf and feature.requires_grad


def test_r1_passes_gradgradcheck():
    weight = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    feature = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)

    def penalty(weight, feature):
        return r1_penalty([(feature @ weight).tanh().sum(-1)], [feature], gamma=1.0)

    assert torch.autograd.gradcheck(penalty, (weight, feature))


def test_distillation_weights_match_hand_computation():
    alpha, sigma = torch.tensor([0.6, 0.8]), torch.tensor([0.8, 0.6])
    assert distillation_weight("exponential", alpha, sigma).tolist() == pytest.approx([0.6, 0.8])
    # alpha / (2 sigma) * sigma^2 = 0.6 / 1.6 * 0.64 and 0.8 / 1.2 * 0.36
    assert distillation_weight("sds", alpha, sigma).tolist() == pytest.approx([0.24, 0.24])
    assert distillation_weight("nfsd", alpha, sigma).tolist() == pytest.approx([0.24, 0.24])


def test_distillation_loss_is_the_weighted_mean_over_elements_and_spares_the_teacher():
    student = torch.zeros(2, 3, 1, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.full((2, 3, 1, 2), 2.0, dtype=torch.float64, requires_grad=True)  # squared error 4 everywhere
    loss = distillation_loss(student, teacher, torch.tensor([1.0, 0.5]).double())
    loss.backward()
    assert loss.item() == pytest.approx((1.0 * 4 + 0.5 * 4) / 2)  # not 6 times that: a mean over elements
    assert teacher.grad is None
    # 2 * weight * (0 - 2) / (2 pictures * 6 elements)
    assert student.grad[:, 0, 0, 0].tolist() == pytest.approx([-1 / 3, -1 / 6])


def test_distillation_loss_takes_the_schedules_rates_as_they_come():
    student, teacher = torch.zeros(2, 1, 1, 1), torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1)
    weight = torch.tensor([1.0, 0.5])
    # each picture by its own weight: (1 * 1 + 0.5 * 4) / 2; broadcast to 2 x 2 it would be 1.875
    assert distillation_loss(student, teacher, weight).item() == 1.5
    assert distillation_loss(student, teacher, weight.reshape(2, 1, 1, 1)).item() == 1.5
    with pytest.raises(RuntimeError):
        distillation_loss(student, teacher, torch.ones(3))


def test_sds_weight_gives_the_score_distillation_gradient():
    """d/dx c ||x - sg(x_teacher)||^2 = w (eps_hat - eps), w = sigma^2, up to our mean's 1 / (b c h w)."""
    alpha, sigma = torch.tensor([0.6, 0.8]).double(), torch.tensor([0.8, 0.6]).double()
    a, s = alpha.reshape(2, 1, 1, 1), sigma.reshape(2, 1, 1, 1)
    x0 = torch.randn(2, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    eps, eps_hat = torch.randn(2, 2, 4, 2, 2, dtype=torch.float64)
    x0_teacher = (a * x0 + s * eps - s * eps_hat) / a
    distillation_loss(x0, x0_teacher, distillation_weight("sds", alpha, sigma)).backward()
    torch.testing.assert_close(x0.grad, s**2 * (eps_hat - eps) / x0.numel())


def test_nfsd_target_matches_hand_computation_on_both_sides_of_the_threshold():
    def full(value):
        return torch.full((2, 1, 1, 1), value, dtype=torch.float64)

    alpha, sigma = torch.tensor([0.6, 0.6]).double(), torch.tensor([0.8, 0.8]).double()
    target = nfsd_target(full(1.0), full(0.5), full(0.2), full(0.4), torch.tensor([199, 200]), alpha, sigma, scale=10.0)
    # scale * delta_C = 3; delta_D = 0.2 below t = 200, 0.2 - 0.4 from there on; sigma / alpha = 4/3
    assert target.flatten().tolist() == pytest.approx([1 - 4 / 3 * 3.2, 1 - 4 / 3 * 2.8])


def test_nfsd_gradient_is_the_noise_free_score_and_holds_no_teacher_gradient():
    alpha, sigma = torch.tensor([0.6]).double(), torch.tensor([0.8]).double()
    x0, text, blank, negative = torch.randn(4, 1, 4, 2, 2, dtype=torch.float64).requires_grad_().unbind()
    x0 = x0.detach().requires_grad_()
    target = nfsd_target(x0, text, blank, negative, torch.tensor([500]), alpha, sigma)
    assert not target.requires_grad
    distillation_loss(x0, target, distillation_weight("nfsd", alpha, sigma)).backward()
    delta = (blank - negative + 7.5 * (text - blank)).detach()
    torch.testing.assert_close(x0.grad, 0.64 * delta / x0.numel())


def test_student_loss_matches_hand_computation_and_spares_the_teacher():
    logits = [torch.tensor([[1.0], [3.0]]), torch.tensor([[0.5], [0.5]])]  # head means 2 and 1/2
    student = torch.zeros(2, 1, 1, 1, requires_grad=True)
    teacher = torch.full((2, 1, 1, 1), 2.0, requires_grad=True)  # squared error 4
    loss = student_loss(logits, student, teacher, alpha_t=torch.tensor([1.0, 0.5]))
    loss.backward()
    assert loss.item() == pytest.approx(-(2 + 0.5) + 2.5 * (1.0 * 4 + 0.5 * 4) / 2)
    assert student.grad is not None and teacher.grad is None


def test_student_loss_can_weight_as_score_distillation():
    logits, student, teacher = [torch.zeros(1, 1)], torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0)
    loss = student_loss(logits, student, teacher, torch.tensor([0.6]), kind="sds", distill_weight=1.0)
    assert loss.item() == pytest.approx(0.6 * 0.8 / 2 * 4)


def test_losses_pass_gradcheck_in_float64():
    real, fake, pixels = torch.randn(2, 3).double(), torch.randn(2, 3).double(), torch.randn(2, 3, 2, 2).double()
    weight = torch.tensor([0.3, 0.7]).double()
    student = torch.randn(2, 3, 2, 2).double()
    for tensor in (real, fake, student):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda r, f: hinge_loss([r], [f]), (real, fake))
    assert torch.autograd.gradcheck(lambda f: adversarial_loss([f]), (fake,))
    assert torch.autograd.gradcheck(lambda x: distillation_loss(x, pixels, weight), (student,))
