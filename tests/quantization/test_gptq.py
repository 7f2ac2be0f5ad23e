"""GPTQ against elimination written from the paper, against rounding, and under inputs that break careless code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from reference.gptq import damped
from reference.gptq import gptq as slow_gptq

from hf_slim.quantization import gptq, rtn
from hf_slim.quantization.grid import from_grid


def problem(rows: int, cols: int, seed: int, tokens: int = 2048):
    """Weights, and H of inputs that are correlated and of unequal size, as a transformer's are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=generator) / cols**0.5 + torch.eye(cols)
    sizes = torch.exp(torch.randn(cols, generator=generator))
    x = torch.randn(tokens, cols, generator=generator) @ mix * sizes
    return torch.randn(rows, cols, generator=generator), 2 / tokens * x.T @ x


def oracle(W, H, scales, zeros, bits, group_size, act_order, keep=None, damping=0.01):
    diagonal = np.diag(damped(H.double().numpy(), 0.0))
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(len(H))
    return slow_gptq(
        W.numpy(), H.numpy(), scales.numpy(), zeros.numpy(), bits, group_size, damping, order.tolist(), keep
    )


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 8), (3, 7), (4, None), (4, 5), (8, 64)])
def test_matches_elimination_from_the_paper(bits, group_size, symmetric, act_order):
    W, H = problem(6, 30, seed=bits)
    codes, scales, zeros, _ = gptq.quantize(W, H, bits, group_size, symmetric, act_order=act_order, block=4)
    expected = oracle(W, H, scales, zeros, bits, group_size, act_order)
    np.testing.assert_allclose(from_grid(codes, scales, zeros, group_size).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("act_order", [False, True])
def test_pruned_weights_stay_zero_and_their_error_is_repaired(act_order):
    W, H = problem(6, 30, seed=11)
    keep = torch.rand(6, 30, generator=torch.Generator().manual_seed(0)) < 0.6
    codes, scales, zeros, report = gptq.quantize(W, H, 4, 8, act_order=act_order, keep=keep, block=4)
    W_hat = from_grid(codes, scales, zeros, 8)
    assert (W_hat[~keep] == 0).all()
    np.testing.assert_allclose(W_hat.numpy(), oracle(W, H, scales, zeros, 4, 8, act_order, keep.numpy()), atol=1e-4)
    rounded = from_grid(*rtn.quantize(W, 4, 8, keep=keep), 8)
    assert report.relative_error < 0.95 * gptq.relative_error(W, rounded, H)


@pytest.mark.parametrize("act_order", [False, True])
def test_column_without_input_is_rounded_to_nearest_and_disturbs_nothing(act_order):
    W, H = problem(6, 30, seed=12)
    H[[3, 17]], H[:, [3, 17]] = 0.0, 0.0
    codes, scales, zeros, _ = gptq.quantize(W, H, 4, 8, act_order=act_order, block=4)
    W_hat = from_grid(codes, scales, zeros, 8)
    np.testing.assert_allclose(W_hat.numpy(), oracle(W, H, scales, zeros, 4, 8, act_order), atol=1e-4)
    groups = torch.tensor([3 // 8, 17 // 8])
    nearest = (W[:, [3, 17]] / scales[:, groups].float()).round() + zeros[:, groups]
    assert torch.equal(codes[:, [3, 17]].float(), nearest.clamp(0, 15))


@pytest.mark.parametrize("keeping", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_block_changes_nothing_but_speed(act_order, keeping):
    W, H = problem(8, 100, seed=3)
    keep = torch.rand(8, 100, generator=torch.Generator().manual_seed(0)) < 0.7 if keeping else None
    results = []
    for block in (1, 7, 32, 128):
        codes, scales, zeros, _ = gptq.quantize(W, H, 3, 32, act_order=act_order, block=block, keep=keep)
        results.append(from_grid(codes, scales, zeros, 32))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("bits", "act_order", "most"), [(2, True, 0.5), (3, True, 0.5), (4, True, 0.5), (4, False, 0.7)]
)
def test_beats_rounding_across_blocks_and_groups(bits, act_order, most):
    ratios = []
    for seed in range(3):
        W, H = problem(48, 200, seed)
        *stored, report = gptq.quantize(W, H, bits, 24, clip="minmax", act_order=act_order, block=16)
        assert report.relative_error == pytest.approx(gptq.relative_error(W, from_grid(*stored, 24), H), rel=1e-4)
        rounded = from_grid(*rtn.quantize(W, bits, 24, clip="minmax"), 24)
        ratios.append(report.relative_error / gptq.relative_error(W, rounded, H))
    assert max(ratios) < most, ratios


def test_weighted_clipping_beats_min_max():
    W, H = problem(48, 200, seed=5)
    errors = {clip: gptq.quantize(W, H, 3, 64, clip=clip)[-1].relative_error for clip in ("minmax", "mse")}
    assert errors["mse"] < 0.9 * errors["minmax"]


def test_independent_inputs_mean_plain_rounding():
    W, _ = problem(8, 40, seed=6)
    codes, scales, zeros, _ = gptq.quantize(W, torch.eye(40), 4, 16)
    expected = rtn.quantize(W, 4, 16)
    for found, wanted in zip((codes, scales, zeros), expected, strict=True):
        assert torch.equal(found, wanted)


def test_scale_of_the_inputs_does_not_matter():
    W, H = problem(8, 40, seed=7)
    codes = gptq.quantize(W, H, 4, 16)[0]
    assert torch.equal(gptq.quantize(W, H * 2**-20, 4, 16)[0], codes)


def test_rows_are_independent_so_layers_can_be_stacked():
    W, H = problem(20, 60, seed=8)
    together = gptq.quantize(W, H, 4, 16)[0]
    shared = gptq.factor(H)
    apart = [gptq.quantize(part, H, 4, 16, shared=shared)[0] for part in W.split([4, 10, 6])]
    assert torch.equal(together, torch.cat(apart))


def test_factor_reproduces_the_damped_hessian():
    _, H = problem(1, 40, seed=9)
    root, order, damping = gptq.factor(H, 0.05)
    assert damping == 0.05
    assert torch.equal(root, root.triu())
    assert (H.diagonal()[order].diff() <= 0).all()
    wanted = damped(H.double().numpy(), 0.05)[np.ix_(order, order)]
    np.testing.assert_allclose((root @ root.T).numpy(), wanted, rtol=1e-4, atol=1e-4 * wanted.max())


def test_too_few_tokens_still_work():
    W, H = problem(16, 96, seed=10, tokens=20)
    *stored, report = gptq.quantize(W, H, 4, 32)
    rounded = from_grid(*rtn.quantize(W, 4, 32), 32)
    assert report.damping == 0.01
    assert report.relative_error < 0.2 * gptq.relative_error(W, rounded, H)
    assert from_grid(*stored, 32).isfinite().all()


def test_damping_grows_until_the_factorisation_succeeds():
    _, H = problem(1, 40, seed=13)
    values, vectors = torch.linalg.eigh(H)
    values[0] = -0.05 * H.diagonal().mean()
    assert gptq.factor((vectors * values) @ vectors.T, 0.001).damping == pytest.approx(0.1)
    values[0] = -0.5 * H.diagonal().mean()
    assert gptq.factor((vectors * values) @ vectors.T, 0.03).damping == 1.0


@pytest.mark.parametrize("broken", ["nan", "inf", "negative"])
def test_hopeless_hessian_raises(broken):
    _, H = problem(1, 12, seed=14)
    if broken == "negative":
        H = -H
    else:
        H[2, 3] = H[3, 2] = float(broken)
    with pytest.raises(gptq.SingularHessian, match="damping 1"):
        gptq.factor(H)


def test_no_input_at_all_means_plain_rounding():
    W, _ = problem(4, 20, seed=15)
    codes, _, _, report = gptq.quantize(W, torch.zeros(20, 20), 4, 8)
    assert torch.equal(codes, rtn.quantize(W, 4, 8)[0])
    assert report.relative_error == 0.0


def test_feedback_works_on_a_codebook():
    W, H = problem(24, 90, seed=16)
    book = torch.tensor([-1.8, -0.9, -0.3, 0.2, 0.8, 1.9])

    def round_column(w, column):
        codes = (w[:, None] - book).abs().argmin(1)
        return codes, book[codes]

    codes, W_hat = gptq.error_feedback(W, gptq.factor(H), round_column)
    assert torch.equal(W_hat, book[codes.long()])
    rounded = book[(W[..., None] - book).abs().argmin(-1)]
    assert gptq.relative_error(W, W_hat, H) < 0.6 * gptq.relative_error(W, rounded, H)


def test_arguments_are_left_alone():
    W, H = problem(4, 20, seed=17)
    before = W.clone(), H.clone()
    gptq.quantize(W, H, 4, 8)
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "greater than or equal to 2"),
        ({"bits": 9}, "less than or equal to 8"),
        ({"damping": 0.0}, "greater than 0"),
        ({"damping": 2}, "less than or equal to 1"),
        ({"block": 0}, "greater than or equal to 1"),
        ({"desc_act": True}, "Extra inputs are not permitted"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        gptq.Config(**options)
