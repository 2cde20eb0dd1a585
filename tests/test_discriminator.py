"""The discriminator's heads: formula, shapes, conditioning, spectral norm, gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F

from onestroke.distill import discriminator as discriminator_module
from onestroke.distill.discriminator import Discriminator, Head, SpectralConv, circular_pad
from onestroke.distill.losses import adversarial_loss, hinge_loss, r1_features, r1_penalty

WIDTHS = (16, 24)


def discriminator(**options) -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(WIDTHS, **{"is_spatial": False, **options})


def tokens(batch: int = 3, count: int = 10, *, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, count, width, generator=generator) for width in WIDTHS]


def maps(batch: int = 3, sizes: tuple = ((6, 4), (3, 2))) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(batch, w, *size, generator=generator) for w, size in zip(WIDTHS, sizes, strict=True)]


def conditions(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 5, generator=generator), torch.randn(batch, 7, generator=generator)


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, two, strict=True))


def normalised_weight(conv: SpectralConv) -> torch.Tensor:
    return conv.weight / torch.linalg.matrix_norm(conv.weight.flatten(1), ord=2)


def test_a_token_head_is_the_published_chain_with_one_dimensional_convolutions():
    """An independent reference: conv1d on b d n, circular padding by torch, the exact largest singular value."""
    torch.manual_seed(0)
    head = Head(16, is_spatial=False, condition_dim=5, normalise_input=False)
    for _ in range(300):
        for conv in (head.enter, head.residual, head.leave):
            conv.advance()
    x, c = torch.randn(2, 9, 16), torch.randn(2, 5)

    y = x.transpose(1, 2)
    y = F.conv1d(y, normalised_weight(head.enter)[:, :, 0], head.enter.bias)
    y = F.leaky_relu(F.group_norm(y, 2, head.enter_norm.weight, head.enter_norm.bias), 0.2)
    z = F.conv1d(F.pad(y, (4, 4), "circular"), normalised_weight(head.residual)[:, :, 0], head.residual.bias)
    z = F.leaky_relu(F.group_norm(z, 2, head.residual_norm.weight, head.residual_norm.bias), 0.2)
    y = (z + y) / 2**0.5
    y = F.conv1d(y, normalised_weight(head.leave)[:, :, 0], head.leave.bias)
    expected = torch.einsum("bdn,bd->bn", y, c @ head.fc_weight.T + head.fc_bias) / 8

    torch.testing.assert_close(head(x, c), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9, 37])
def test_any_number_of_tokens_gives_one_logit_each(count):
    logits = discriminator()(tokens(2, count))
    assert [tuple(head.shape) for head in logits] == [(2, count), (2, count)]
    assert all(head.isfinite().all() for head in logits)


@pytest.mark.parametrize("sizes", [((1, 1), (1, 1)), ((4, 4), (2, 2)), ((7, 3), (1, 5)), ((16, 9), (8, 4))])
def test_any_size_and_aspect_of_maps_gives_one_logit_per_position(sizes):
    logits = discriminator(is_spatial=True)(maps(2, sizes))
    assert [tuple(head.shape) for head in logits] == [(2, h * w) for h, w in sizes]
    assert all(head.isfinite().all() for head in logits)


def test_logits_do_not_vanish_on_a_single_position():
    (one, _) = discriminator()(tokens(2, 1))
    (other, _) = discriminator()(tokens(2, 1, seed=5))
    assert (one - other).abs().min() > 1e-3


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_circular_padding_continues_the_sequence_periodically_at_any_size(size):
    x = torch.arange(size)
    expected = [(i - 4) % size for i in range(size + 8)]
    assert circular_pad(x, 4, dim=0).tolist() == expected


def test_heads_are_equivariant_to_circular_shifts():
    d = discriminator(is_spatial=True)
    logits = d(maps())[0].reshape(3, 6, 4)
    shifted = d([m.roll((2, 1), (2, 3)) for m in maps()])[0].reshape(3, 6, 4)
    torch.testing.assert_close(shifted, logits.roll((2, 1), (1, 2)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("is_spatial", [False, True])
def test_a_pictures_logits_do_not_depend_on_the_rest_of_the_batch(is_spatial):
    d = discriminator(is_spatial=is_spatial, conditioning="both", text_dim=5, image_dim=7)
    features, (text, image) = (maps() if is_spatial else tokens()), conditions()
    together = d(features, text, image)
    alone = d([f[1:2] for f in features], text[1:2], image[1:2])
    assert same([head[1:2] for head in together], alone)


@pytest.mark.parametrize("conditioning", ["none", "text", "image", "both"])
def test_the_conditions_in_use_and_no_others_change_the_logits(conditioning):
    d = discriminator(conditioning=conditioning, text_dim=5, image_dim=7)
    features, (text, image) = tokens(), conditions()
    before = d(features, text, image)
    assert same(before, d(features, text.flip(0), image)) == (conditioning in ("none", "image"))
    assert same(before, d(features, text, image.flip(0))) == (conditioning in ("none", "text"))


def test_an_image_that_the_student_was_not_given_is_masked():
    d = discriminator(conditioning="both", text_dim=5, image_dim=7)
    features, (text, image) = tokens(), conditions()
    has_image = torch.tensor([True, False, True])
    masked = d(features, text, image, has_image)
    poisoned = image.clone()
    poisoned[1] = float("nan")  # what stands in a masked row never matters
    assert same(masked, d(features, text, poisoned, has_image))
    plain = d(features, text, image)
    assert same([head[[0, 2]] for head in masked], [head[[0, 2]] for head in plain])
    assert not same([head[1:2] for head in masked], [head[1:2] for head in plain])


def test_the_text_condition_survives_the_image_mask():
    d = discriminator(conditioning="both", text_dim=5, image_dim=7)
    features, (text, image) = tokens(), conditions()
    none = torch.zeros(3, dtype=torch.bool)
    assert not same(d(features, text, image, none), d(features, text.flip(0), image, none))


def test_a_condition_is_read_at_unit_scale():
    d = discriminator(conditioning="text", text_dim=5)
    text, _ = conditions()
    assert same(d(tokens(), text), d(tokens(), 1000 * text))


def test_a_missing_condition_is_refused():
    with pytest.raises(AssertionError, match="text"):
        discriminator(conditioning="text", text_dim=5)(tokens())


def test_forward_never_advances_spectral_norm_and_is_one_function_in_train_and_eval():
    d = discriminator()
    before = copy.deepcopy(d.state_dict())
    d.train()
    training = [d(tokens()) for _ in range(3)][-1]
    d.heads.train()  # nor when a submodule's mode is set
    again = d(tokens())
    d.eval()
    assert all(torch.equal(a, b) for a, b in zip(training + training, again + d(tokens()), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in d.state_dict().items())


def test_advance_spectral_norm_moves_only_the_singular_vectors_and_reaches_the_exact_norm():
    d = discriminator()
    with torch.no_grad():  # weights that an optimizer changed: the old singular vectors no longer fit
        for parameter in d.parameters():
            parameter.copy_(torch.randn_like(parameter))
    before = copy.deepcopy(d.state_dict())
    d.advance_spectral_norm()
    moved = {name for name, value in d.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(name.endswith((".u", ".v")) for name in moved)
    for _ in range(300):
        d.advance_spectral_norm()
    for conv in (module for module in d.modules() if isinstance(module, SpectralConv)):
        assert conv.sigma().item() == pytest.approx(
            torch.linalg.matrix_norm(conv.weight.flatten(1), ord=2).item(), 1e-3
        )


def test_a_convolution_and_its_gradients_are_those_of_the_divided_weight():
    """Beside torch's spectral_norm, which divides the weight: outputs, gradients, and R1's gradients of gradients."""
    ours, theirs = SpectralConv(6, 8, (3, 3)), torch.nn.Conv2d(6, 8, 3)
    theirs.load_state_dict({"weight": ours.weight, "bias": ours.bias})
    torch.nn.utils.parametrizations.spectral_norm(theirs)
    theirs.parametrizations.weight[0].load_state_dict({"_u": ours.u, "_v": ours.v})
    theirs.eval()
    x = torch.randn(2, 6, 4, 5, requires_grad=True)
    padded = circular_pad(circular_pad(x, 1, dim=-2), 1, dim=-1)
    found = []
    both = (ours(x) / ours.sigma(), ours.weight), (theirs(padded), theirs.parametrizations.weight.original)
    for output, weight in both:
        (slope,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        found.append((output, slope, *torch.autograd.grad(slope.square().sum() + output.sin().sum(), (x, weight))))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3), (3, 3), (4, 2)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 9)])
def test_a_small_maps_product_is_the_convolution(size, kernel, monkeypatch):
    """Outputs, gradients, and R1's gradients of gradients."""
    conv, x = SpectralConv(6, 8, kernel), torch.randn(2, 6, *size, requires_grad=True)
    found = []
    for most in (9, 0):
        monkeypatch.setattr(discriminator_module, "SMALL_MAP", most)
        output = conv(x)
        (slope,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        wanted = slope.square().sum() + output.sin().sum()
        found.append((output, slope, *torch.autograd.grad(wanted, (x, conv.weight, conv.bias))))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_a_restored_discriminator_computes_and_advances_the_same():
    one = discriminator()
    one.advance_spectral_norm()
    torch.manual_seed(9)
    two = Discriminator(WIDTHS, is_spatial=False)
    two.load_state_dict(one.state_dict())
    one.advance_spectral_norm()
    two.advance_spectral_norm()
    assert all(torch.equal(a, b) for a, b in zip(one(tokens()), two(tokens()), strict=True))


def test_heads_run_under_bfloat16_autocast_with_logits_in_float32():
    d = discriminator(is_spatial=True, conditioning="both", text_dim=5, image_dim=7)
    features, (text, image) = r1_features(maps()), conditions()
    exact = d(features, text, image)
    with torch.autocast("cpu", torch.bfloat16):
        logits = d(features, text, image)
        penalty = r1_penalty(logits, features)
    d.advance_spectral_norm()
    (hinge_loss(logits, logits) + penalty).backward()
    assert all(head.dtype == torch.float32 for head in logits)
    assert all(torch.allclose(a, b, atol=0.2) for a, b in zip(logits, exact, strict=True))
    assert all(p.grad.isfinite().all() for p in d.parameters())


@pytest.mark.parametrize("is_spatial", [False, True])
def test_r1_through_the_heads_matches_finite_differences(is_spatial):
    """Double backward: the penalty's slope along a direction in parameter space."""
    d = discriminator(is_spatial=is_spatial).double()
    features = r1_features([f.double() for f in (maps(2) if is_spatial else tokens(2, 5))])

    def penalty() -> torch.Tensor:
        return r1_penalty(d(features), features, gamma=1.0)

    penalty().backward()
    # the last convolution's bias is added to the logits: no gradient of the features' gradient reaches it
    parameters = [p for p in d.parameters() if p.grad is not None]
    assert len(parameters) >= len(list(d.parameters())) - 2
    torch.manual_seed(4)
    directions = [torch.randn_like(p) for p in parameters]
    slope = sum((p.grad * v).sum() for p, v in zip(parameters, directions, strict=True))
    values = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for p, v in zip(parameters, directions, strict=True):
                p.add_(step * v)
        values.append(penalty().item())
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope.item(), rel=1e-4)


def test_r1_is_taken_of_the_raw_features_when_the_input_is_normalised():
    """Scaling a feature by 10 leaves a normalised head's logits and divides the raw gradient by 10."""
    d = discriminator(normalise_input=True)
    small, large = r1_features(tokens()), r1_features([10 * f for f in tokens()])
    assert same(d(small), d(large))
    penalties = [r1_penalty(d(f), f).item() for f in (small, large)]
    assert penalties[0] == pytest.approx(100 * penalties[1], rel=1e-2)


def test_the_discriminators_loss_does_not_reach_the_student_and_the_students_reaches_it_through_frozen_heads():
    d = discriminator()
    student = torch.ones(1, requires_grad=True)
    fake = [f * student for f in tokens()]
    hinge_loss(d(tokens(seed=7)), d([f.detach() for f in fake])).backward()
    assert student.grad is None and all(p.grad is not None for p in d.parameters())
    d.zero_grad()
    d.requires_grad_(False)
    adversarial_loss(d(fake)).backward()
    assert student.grad.abs() > 0 and all(p.grad is None for p in d.parameters())


def test_the_wrong_kind_of_feature_is_refused():
    with pytest.raises(AssertionError, match="shape"):
        discriminator()(maps())
    with pytest.raises(AssertionError, match="1 features for 2 heads"):
        discriminator()(tokens()[:1])


def test_a_step_of_adam_on_the_hinge_loss_tells_real_from_fake():
    d = discriminator(conditioning="text", text_dim=5)
    optimizer = torch.optim.Adam(d.parameters(), 3e-3, betas=(0.0, 0.99))
    (text, _), real, fake = conditions(), tokens(seed=7), tokens(seed=8)
    for _ in range(30):
        loss = hinge_loss(d(real, text), d(fake, text))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        d.advance_spectral_norm()
    assert loss.item() < 1  # 4 where undecided
