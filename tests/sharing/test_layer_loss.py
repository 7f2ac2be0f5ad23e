"""Calibrated codebooks against least squares and descent written out, and each solver against the one before it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from reference import layer_loss

from hf_slim.core.feedback import error_feedback, factor
from hf_slim.quantization import gptq
from hf_slim.quantization.grid import from_grid
from hf_slim.sharing import descent, kmeans, lnq, vq
from hf_slim.sharing.descent import Tables


def problem(rows: int, cols: int, seed: int, tokens: int = 2048):
    """Heavy-tailed weights, and H of correlated inputs twice: one to solve with, one held out."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=generator) / cols**0.5 + torch.eye(cols)
    sizes = torch.exp(torch.randn(cols, generator=generator))
    x = torch.randn(2 * tokens, cols, generator=generator) @ mix * sizes
    tails = torch.rand(rows, cols, generator=generator).clamp(min=0.1).rsqrt()
    W = torch.randn(rows, cols, generator=generator) * tails
    return W, *(2 / tokens * part.T @ part for part in x.split(tokens))


def any_tables(rows: int, cols: int, d: int, per_book: int, seed: int, scaled: bool = False) -> Tables:
    """Tables of 5 entries, the last without members."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(4, (rows, cols // d), generator=generator).to(torch.uint8)
    book = torch.arange(rows) // per_book
    tables = torch.randn(int(book[-1]) + 1, 5, d, generator=generator).sort(1).values
    return Tables(codes, tables, book, 0.5 + torch.rand(rows, generator=generator) if scaled else None)


def keep_float32(tables):
    return tables


def error(W, Q, H):
    return (descent.losses(W, Q, H[None]).sum() / descent.losses(W, torch.zeros_like(W), H[None]).sum()).item()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("d", "per_book"), [(1, 1), (1, 3), (2, 2), (4, 7)])
def test_tables_are_the_least_squares_solution(d, per_book, scaled, groups):
    W, H, other = problem(7, 24, seed=d)
    hessians = torch.stack([H, other])[:groups]
    found = any_tables(7, 24, d, per_book, seed=1, scaled=scaled)
    refitted = descent.refit_tables(W, found, hessians, keep_float32)
    of_row = [None] * 7
    for rows, group in descent.row_runs(7, hessians):
        for r in range(rows.start, rows.stop):
            of_row[r] = group.double().numpy()
    expected = np.zeros((7, 24))
    for book in range(len(found.tables)):
        rows = [r for r in range(7) if found.book[r] == book]
        scales = None if found.scales is None else found.scales.double().numpy()[rows]
        codes = found.codes.numpy()[rows]
        table = layer_loss.best_table(
            W.double().numpy()[rows], codes, 5, d, lambda i, rows=rows: of_row[rows[i]], scales
        )
        for i, r in enumerate(rows):
            expected[r] = table[codes[i]].flatten() * (1.0 if scales is None else scales[i])
    np.testing.assert_allclose(refitted.values().numpy(), expected, rtol=2e-3, atol=2e-3)
    best = layer_loss.loss(W.double().numpy(), expected, of_row.__getitem__)
    assert layer_loss.loss(W.double().numpy(), refitted.values().double().numpy(), of_row.__getitem__) < best * 1.0001


@pytest.mark.parametrize(("d", "per_book"), [(1, 1), (1, 7), (2, 7), (4, 3)])
def test_descent_tries_every_entry_of_every_run(d, per_book):
    W, H, _ = problem(7, 132, seed=d)  # more columns than a block
    found = any_tables(7, 132, d, per_book, seed=2)
    tables = found.tables[found.book].double().numpy()
    expected = layer_loss.descend(
        W.double().numpy(), found.values().double().numpy(), tables.__getitem__, lambda r: H.double().numpy(), d
    )
    after = descent.descend(W, found, H[None])
    assert (after.codes.numpy() == expected).mean() > 0.99  # two entries may be equally good in float32
    lost = descent.losses(W, after.values(), H[None]).sum()
    assert lost < descent.losses(W, found.values(), H[None]).sum()
    repeated = [np.concatenate([tables[r][code] for code in row]) for r, row in enumerate(expected)]
    assert lost == pytest.approx(layer_loss.loss(W.numpy(), np.stack(repeated), lambda r: H.numpy()), rel=1e-3)


@pytest.mark.parametrize("d", [2, 4])
def test_feedback_in_runs_takes_what_is_best_given_the_runs_before(d):
    """Each run's entry is the one with which the loss of the runs so far, all later weights free, is least."""
    W, H, _ = problem(3, 16, seed=d)
    table = torch.randn(6, d, generator=torch.Generator().manual_seed(0))
    shared = factor(H, 0.01, run=d)
    found = Tables(torch.zeros(3, 16 // d, dtype=torch.uint8), table[None], torch.zeros(3, dtype=torch.long))
    after = descent.feed_back(W, found, descent.Curvature(H[None], (shared,)))
    Hd = descent.damped(H, shared.damping).double()
    assert torch.equal(shared.order.view(-1, d).diff(dim=1), torch.ones(16 // d, d - 1, dtype=torch.long))
    for r in range(3):
        chosen, E = [], torch.zeros(16, dtype=torch.float64)
        for first in shared.order[::d].tolist():
            here = list(range(first, first + d))
            chosen += here
            rest = [c for c in range(16) if c not in chosen]
            schur = Hd[chosen][:, chosen]
            if rest:
                schur = schur - Hd[chosen][:, rest] @ torch.linalg.solve(Hd[rest][:, rest], Hd[rest][:, chosen])
            losses = []
            for entry in table.double():
                E[here] = W[r, here].double() - entry
                losses.append((E[chosen] @ schur @ E[chosen]).item())
            code = int(np.argmin(losses))
            assert after.codes[r, first // d] == code
            E[here] = W[r, here].double() - table[code].double()


@pytest.mark.parametrize("block", [2, 6, 32])
def test_blocks_change_nothing_for_runs(block):
    W, H, _ = problem(5, 40, seed=3)
    shared = factor(H, run=4)
    table = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(0))
    found = Tables(torch.zeros(5, 10, dtype=torch.uint8), table, torch.zeros(5, dtype=torch.long))
    nearest = descent.rounder(found, shared.metrics(4), slice(0, 5))
    codes, Q = error_feedback(W, shared, nearest, block, run=4)
    wanted, _ = error_feedback(W, shared, nearest, 4, run=4)
    assert torch.equal(codes, wanted)
    assert torch.equal(Q, found._replace(codes=codes).values())


@pytest.mark.parametrize("centroids", ["float16", "int8"])
@pytest.mark.parametrize(("scope", "scales"), [("row", None), (5, None), ("tensor", "row")])
@pytest.mark.parametrize("pruned", [False, True])
def test_the_loss_never_rises(scope, scales, centroids, pruned):
    W, H, other = problem(12, 40, seed=4)
    keep = torch.rand(12, 40, generator=torch.Generator().manual_seed(0)) < 0.6 if pruned else None
    hessians = torch.stack([H, other])
    found, report = lnq.quantize(W, hessians, 2, scope, scales, centroids, keep=keep)
    assert all(b <= a * (1 + 1e-6) for a, b in zip(report.losses, report.losses[1:], strict=False)), report.losses
    assert report.losses[-1] < 0.98 * report.losses[0]
    assert torch.equal(lnq.rounding(centroids)(found.tables), found.tables) or centroids == "int8"
    if keep is not None:
        assert (found.values()[~keep] == 0).all()  # without help of the mask
        assert found.values()[keep].count_nonzero() > 0.4 * keep.sum()


@pytest.mark.parametrize("dim", [2, 4])
@pytest.mark.parametrize(("scope", "scales"), [("tensor", "row"), (5, None)])
def test_the_loss_of_vectors_never_rises(dim, scope, scales):
    W, H, _ = problem(12, 42, seed=5)  # the last run of 4 is cut short
    found, report = vq.quantize(W, H[None], 5, dim, scope, scales)
    assert all(b <= a * (1 + 1e-6) for a, b in zip(report.losses, report.losses[1:], strict=False)), report.losses
    assert report.losses[-1] < 0.98 * report.losses[0]
    assert report.relative_error == pytest.approx(error(W, found.values()[:, :42], H), rel=1e-2)


@pytest.mark.parametrize("bits", [2, 3])
def test_each_solver_beats_the_one_before_on_held_out_inputs(bits):
    W, H, held_out = problem(96, 128, seed=6)
    codes, tables = kmeans.quantize(W, bits, "row")
    found = [tables.gather(1, codes.long())]
    found += [lnq.quantize(W, H[None], bits, "row", rounds=rounds)[0].values() for rounds in (0, 3)]
    plain, feedback, alternating = (error(W, Q, held_out) for Q in found)
    assert feedback < 0.4 * plain
    assert alternating < 0.97 * feedback


@pytest.mark.parametrize("bits", [2, 3])
def test_a_table_for_four_rows_beats_affine_groups_that_take_more_room(bits):
    W, H, held_out = problem(96, 128, seed=6)
    extra = 2**bits * 16 / (4 * 128) - 24 / 64  # bits a weight: tables less scales and zero points
    assert extra < 0
    codes, scales, zeros, _ = gptq.quantize(W, H, bits, 64)
    affine = error(W, from_grid(codes, scales, zeros, 64), held_out)
    assert error(W, lnq.quantize(W, H[None], bits, 4, rounds=2)[0].values(), held_out) * 4**extra < 0.8 * affine


def test_vectors_beat_single_weights_at_equal_stored_bits():
    W, H, held_out = problem(256, 128, seed=7)
    single = error(W, lnq.quantize(W, H[None], 2, "tensor", "row", rounds=1)[0].values(), held_out)
    pairs = error(W, vq.quantize(W, H[None], 4, 2, rounds=1)[0].values(), held_out)
    assert pairs < 0.93 * single  # 4 more float16 entries of 2: 0.01 bits


def test_independent_inputs_mean_kmeans():
    W, _, _ = problem(8, 60, seed=8)
    found, _ = lnq.quantize(W, torch.eye(60)[None], 3, "row", centroids="float32", rounds=0)
    codes, tables = kmeans.quantize(W, 3, "row", centroid_dtype=torch.float32)
    assert error(W, found.values(), torch.eye(60)) <= error(W, tables.gather(1, codes.long()), torch.eye(60)) * 1.002


def test_wide_rows_of_little_use_are_defined():
    """Constant rows, rows of zeros, no input at all: finite, and exact where a table can be."""
    W, H, _ = problem(6, 20, seed=9)
    W[0], W[1] = 0.0, 3.0
    for hessian in (H, torch.zeros(20, 20)):
        for scales in (None, "row"):
            found, report = lnq.quantize(W, hessian[None], 2, "row", scales)
            Q = found.values()
            assert Q.isfinite().all()
            assert (Q[0] == 0).all()
            torch.testing.assert_close(Q[1], W[1], rtol=1e-3, atol=0)
    assert report.relative_error == 0.0
    found, _ = vq.quantize(W, torch.zeros(20, 20)[None], 3, 4)
    assert found.values().isfinite().all()


def test_arguments_are_left_alone():
    W, H, _ = problem(6, 20, seed=10)
    before = W.clone(), H.clone()
    lnq.quantize(W, H[None], 2)
    vq.quantize(W, H[None], 3, 2)
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])


def test_clusters_of_vectors_match_lloyds_steps():
    """From a start where every entry has members, mass and moment by hand."""
    generator = torch.Generator().manual_seed(0)
    x, h = torch.randn(1, 50, 2, generator=generator), 0.1 + torch.rand(1, 50, 2, generator=generator)
    c = vq._seeds(x, h, 4)[0].double()
    for _ in range(3):
        owner = ((x[0].double()[:, None] - c) ** 2 * h[0].double()[:, None]).sum(2).argmin(1)
        c = torch.stack(
            [(h[0].double() * x[0])[owner == k].sum(0) / h[0].double()[owner == k].sum(0) for k in range(4)]
        )
    torch.testing.assert_close(vq.cluster(x, h, 4, 3)[0], c.float(), rtol=1e-4, atol=1e-5)


def test_entries_without_members_are_sown_on_what_is_served_worst():
    x = torch.cat([torch.zeros(1, 40, 2), torch.tensor([[[9.0, 9.0], [9.0, -9.0], [-9.0, 9.0]]])], 1)
    tables = vq.cluster(x, torch.ones_like(x), 4, 4)
    assert vq._nearest(x, torch.ones_like(x), tables)[1].abs().max() < 1e-4


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (lnq.Config, {"bits": 9}, "less than or equal to 8"),
        (lnq.Config, {"damping": 0.0}, "greater than 0"),
        (lnq.Config, {"rounds": -1}, "greater than or equal to 0"),
        (lnq.Config, {"scope": 0}, "greater than 0"),
        (lnq.Config, {"dim": 2}, "Extra inputs are not permitted"),
        (vq.Config, {"dim": 3}, "2 or 4"),
        (vq.Config, {"centroids": "int4"}, "int8"),
    ],
)
def test_impossible_options_are_refused(config, options, message):
    with pytest.raises(ValidationError, match=message):
        config(**options)
