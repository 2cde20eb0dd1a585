"""Muon beside the singular value decomposition, and its other half beside torch's own AdamW."""

import pytest
import torch
from torch import nn

from onestroke.train.method import OptimizerSettings
from onestroke.train.optimizers import OTHER_RATE, UPDATE_RMS, Muon, build_optimizer, matrices_of, orthogonalised


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(48, 48), (40, 120), (120, 40)])
def test_orthogonalising_keeps_the_singular_vectors_and_evens_the_singular_values(shape):
    matrix = numbers(*shape)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonalised(torch.stack([numbers(*shape, seed=1), matrix]))[1].float() @ vt.T
    assert found.diagonal().min() > 0.6 and found.diagonal().max() < 1.3
    assert (found - found.diagonal().diag()).abs().max() < 0.05


def test_a_step_on_a_matrix_is_as_large_as_the_rate_says():
    weight = nn.Parameter(torch.zeros(64, 128))
    optimizer = Muon([weight], [], learning_rate=0.1)
    weight.grad = 1e-3 * numbers(64, 128)  # the gradient's own size does not matter
    optimizer.step()
    # singular values near 1 give a root mean square of 1 / sqrt(128), which the scaling turns into 0.2
    assert weight.square().mean().sqrt().item() == pytest.approx(0.1 * UPDATE_RMS, rel=0.2)
    assert (weight * weight.grad).sum() < 0


def test_matrices_of_one_shape_are_stepped_together_as_each_would_be_alone(monkeypatch):
    monkeypatch.setattr("onestroke.train.optimizers.BATCH_NUMBERS", 2 * 50 * 60)  # two at a time
    together = [nn.Parameter(numbers(*shape, seed=k)) for k, shape in enumerate([(50, 60)] * 3 + [(60, 50)])]
    alone = [nn.Parameter(weight.detach().clone()) for weight in together]
    optimizer, each = Muon(together, [], learning_rate=0.1), [Muon([w], [], learning_rate=0.1) for w in alone]
    for step in range(2):
        for k, (one, two) in enumerate(zip(together, alone, strict=True)):
            one.grad = two.grad = numbers(*one.shape, seed=10 * step + k)
        together[1].grad = alone[1].grad = None  # a weight that took no part
        for muon in (optimizer, *each):
            muon.step()
    assert torch.equal(together[1], numbers(50, 60, seed=1))
    for one, two in zip(together, alone, strict=True):
        torch.testing.assert_close(one, two, atol=5e-3, rtol=0)  # the fast dtype's rounding


def test_a_convolution_is_the_matrix_of_its_output_channels():
    kernel, matrix = nn.Parameter(torch.zeros(50, 6, 3, 3)), nn.Parameter(torch.zeros(50, 54))
    kernel.grad = numbers(50, 6, 3, 3)
    matrix.grad = kernel.grad.reshape(50, 54)
    Muon([kernel, matrix], [], learning_rate=0.1).step()
    assert torch.equal(kernel.reshape(50, 54), matrix)


def test_the_rest_is_stepped_by_adamw():
    ours, theirs = nn.Parameter(numbers(5)), nn.Parameter(numbers(5))
    muon = Muon([], [ours], learning_rate=0.1, weight_decay=0.3)
    adam = torch.optim.AdamW([theirs], OTHER_RATE * 0.1, (0.9, 0.99), weight_decay=0.3)
    for k in range(4):
        ours.grad, theirs.grad = numbers(5, seed=k), numbers(5, seed=k)
        muon.step()
        adam.step()
        torch.testing.assert_close(ours, theirs)


def test_embeddings_biases_and_thin_matrices_are_left_to_adamw():
    network = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 64), nn.Conv2d(8, 64, 3), nn.Linear(64, 8))
    assert [id(w) for w in matrices_of(network)] == [id(network[1].weight), id(network[2].weight)]
    optimizer = build_optimizer(network, OptimizerSettings(1e-3, "muon"))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in network.parameters()} and len(held) == 7


def test_a_restored_state_goes_on_in_the_same_bits():
    def run(cut: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        layer = nn.Linear(64, 64)
        optimizer = build_optimizer(layer, OptimizerSettings(1e-2, "muon"))
        for k in range(4):
            if k == cut:
                state = optimizer.state_dict()
                optimizer = build_optimizer(layer, OptimizerSettings(1e-2, "muon"))
                optimizer.load_state_dict(state)
            layer.weight.grad, layer.bias.grad = numbers(64, 64, seed=k), numbers(64, seed=k)
            optimizer.step()
        return torch.cat([layer.weight.flatten(), layer.bias])

    assert torch.equal(run(None), run(2))
