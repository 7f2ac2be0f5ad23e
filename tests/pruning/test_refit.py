"""The least-squares refit after columns went: numpy's lstsq on the samples themselves is the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_slim.pruning.refit import RIDGE, choose_ridge, refit_affine, refit_columns, refit_loss

KEEP = torch.tensor([True, False, True, True, False, True, True, False])


def _samples(mean: float = 0.0) -> tuple[Tensor, Tensor]:
    """Correlated inputs [500, 8] and a weight [5, 8]."""
    torch.manual_seed(0)
    mix = torch.randn(8, 8, dtype=torch.float64)
    return torch.randn(500, 8, dtype=torch.float64) @ mix + mean * mix[0], torch.randn(5, 8, dtype=torch.float64)


def test_refit_is_the_least_squares_solution_on_the_samples() -> None:
    x, W = _samples()
    oracle = np.linalg.lstsq(x[:, KEEP].numpy(), (x @ W.T).numpy(), rcond=None)[0].T
    found = refit_columns(W, x.T @ x, KEEP, ridge=1e-12)
    assert np.allclose(found.numpy(), oracle, atol=1e-5)


def test_affine_refit_is_the_least_squares_solution_with_a_column_of_ones() -> None:
    x, W = _samples(mean=3.0)
    design = torch.cat([x[:, KEEP], torch.ones(500, 1, dtype=x.dtype)], dim=1)
    oracle = np.linalg.lstsq(design.numpy(), (x @ W.T).numpy(), rcond=None)[0].T
    left, bias = refit_affine(W, x.T @ x / 500, x.mean(0), KEEP, ridge=1e-12)
    assert np.allclose(left.numpy(), oracle[:, :-1], atol=1e-5)
    assert np.allclose(bias.numpy(), oracle[:, -1], atol=1e-4)


def test_refit_loses_less_than_a_mere_cut_and_the_loss_is_that_of_the_samples() -> None:
    x, W = _samples()
    C = x.T @ x / 500
    left = refit_columns(W, C, KEEP)
    loss = refit_loss(W, C, KEEP, left)
    measured = (x @ W.T - x[:, KEEP] @ left.double().T).square().sum() / (x @ W.T).square().sum()
    assert loss == pytest.approx(float(measured), rel=1e-4)
    assert loss < 0.7 * refit_loss(W, C, KEEP, W[:, KEEP])


def test_a_column_that_repeats_another_can_go_for_free() -> None:
    x, W = _samples()
    x[:, 1] = -2 * x[:, 0]  # column 1 goes, 0 stays
    keep = torch.ones(8, dtype=torch.bool)
    keep[1] = False
    left = refit_columns(W, x.T @ x, keep)
    assert torch.allclose(left[:, 0].double(), W[:, 0] - 2 * W[:, 1], atol=1e-4)
    assert refit_loss(W, x.T @ x, keep, left) < 1e-8


def test_singular_moments_keep_the_weights_of_columns_that_are_never_active() -> None:
    x, W = _samples()
    x[:, 0] = 0  # stays, dead
    x[:, 3] = x[:, 2]  # both stay, alike
    left = refit_columns(W, x.T @ x, KEEP)
    assert torch.isfinite(left).all()
    assert torch.equal(left[:, 0], W[:, 0].float())


@pytest.mark.parametrize("keep", [torch.ones(8, dtype=torch.bool), torch.zeros(8, dtype=torch.bool)])
def test_nothing_to_refit_leaves_the_weights(keep: Tensor) -> None:
    x, W = _samples()
    assert torch.equal(refit_columns(W, x.T @ x, keep), W[:, keep].float())


def test_without_data_the_layer_is_merely_cut() -> None:
    _, W = _samples()
    assert torch.equal(refit_columns(W, torch.zeros(8, 8), KEEP), W[:, KEEP].float())


def test_the_ridge_is_as_large_as_the_data_are_few() -> None:
    torch.manual_seed(1)
    keep = torch.arange(24) % 4 > 0
    mix, W = torch.randn(24, 24, dtype=torch.float64) + 2 * torch.eye(24), torch.randn(6, 24, dtype=torch.float64)

    def moment(tokens: int) -> Tensor:
        x = torch.randn(tokens, 24, dtype=torch.float64) @ mix
        return x.T @ x / tokens

    truth = mix.T @ mix
    few = moment(9), moment(9)
    chosen, both = choose_ridge(W, few, keep), (few[0] + few[1]) / 2
    assert chosen is not None
    assert chosen > RIDGE
    assert choose_ridge(W, (moment(20_000), moment(20_000)), keep) < chosen
    careful, careless = (refit_loss(W, truth, keep, refit_columns(W, both, keep, r)) for r in (chosen, RIDGE))
    assert careful < 0.9 * careless


def test_no_refit_where_the_halves_have_nothing_in_common() -> None:
    W = _samples()[1]
    first, second = torch.zeros(8, 8, dtype=torch.float64), torch.zeros(8, 8, dtype=torch.float64)
    first[:2, :2], second[:2, :2] = torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert choose_ridge(W, (first, second), KEEP) is None
