"""Codebooks with runs of columns, row scales, int8 tables and outliers: announced, decoded, learnt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from reference import encodings as oracle

from hf_slim.encodings import Codebook, affine, read_encoding
from hf_slim.encodings.codebook import store_tables
from hf_slim.encodings.outliers import load_outliers, outlier_layout, store_outliers

ROWS, COLS = 9, 22


def draw(seed: int = 0, rows: int = ROWS, cols: int = COLS, share: float | None = None, apart: int = 0, **options):
    """An encoding, its stored tensors, and the weight that they mean, by the oracle."""
    g = torch.Generator().manual_seed(seed)
    keep = None if share is None else torch.rand(rows, cols, generator=g) < share
    encoding = Codebook(
        **{"bits": 3, "clusters": 7} | options, outliers=apart, survivors=None if keep is None else int(keep.sum())
    )
    d, dtype = encoding.dim, encoding.centroid_dtype
    codes = torch.randint(0, encoding.clusters, (rows, -(-cols // d)), generator=g).to(torch.uint8)
    shape = (encoding.books(rows), encoding.clusters) + (() if d == 1 else (d,))
    centroids = torch.randn(*shape, generator=g)
    scales = torch.rand(rows, generator=g).half() if encoding.scales else None
    W = torch.randn(rows, cols, generator=g).bfloat16().float()
    chosen = torch.zeros(rows * cols, dtype=torch.bool)
    chosen[torch.randperm(rows * cols, generator=g)[:apart]] = True
    chosen = chosen.view(rows, cols)
    tensors = encoding.pack(codes, centroids, keep, scales=scales, outliers=(chosen, W) if apart else None)
    tables = oracle.stored_tables(centroids.numpy(), dtype)
    expected = oracle.vectors(codes.numpy(), tables, cols, encoding.rows_per_book, keep)
    if scales is not None:
        expected *= scales.float().numpy()[:, None]
    if apart:
        expected[chosen] = W[chosen].to(tensors["outliers"].dtype).float().numpy()
    return encoding, tensors, expected


CASES = {
    "pairs": draw(dim=2),
    "fours": draw(dim=4, bits=4, clusters=16, rows_per_book=4),
    "cut": draw(dim=4, cols=COLS),
    "scaled": draw(scales="row"),
    "int8": draw(centroid_dtype="int8", rows_per_book=2),
    "apart": draw(apart=11, rows_per_book=4),
    "everything": draw(dim=2, scales="row", centroid_dtype="int8", apart=5, rows_per_book=4),
    "pruned": draw(share=0.4, scales="row", apart=3, centroid_dtype="int8"),
    "bfloat16": draw(centroid_dtype="bfloat16", apart=4),
}
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@each
def test_what_is_announced_is_stored_and_decodes_to_what_is_meant(case):
    encoding, tensors, expected = case
    layout = encoding.layout(ROWS, COLS, torch.float32)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in layout.items()
    }
    assert encoding.nbytes(ROWS, COLS, torch.float32) == sum(t.nbytes for t in tensors.values())
    np.testing.assert_array_equal(encoding.decode(tensors, ROWS, COLS).numpy(), expected)
    assert read_encoding(encoding.model_dump(mode="json")) == encoding


@each
def test_rows_are_read_alone(case):
    encoding, tensors, expected = case
    ids = torch.tensor([8, 0, 0, 3, 8])
    np.testing.assert_array_equal(encoding.take(tensors, ids, ROWS, COLS).numpy(), expected[ids])
    assert encoding.take(tensors, ids[:0], ROWS, COLS).shape == (0, COLS)


def test_runs_are_the_whole(monkeypatch):
    monkeypatch.setattr(affine, "RUN", 1)
    rows, cols = 70, 10
    encoding, tensors, expected = draw(rows=rows, cols=cols, rows_per_book=3, apart=50, scales="row")
    runs = list(encoding.runs(tensors, rows, cols))
    assert len(runs) == 2
    for place, run in runs:
        np.testing.assert_array_equal(run.numpy(), expected[place])


@each
def test_a_centroid_learns_the_sum_over_its_members(case):
    encoding, tensors, _ = case
    if not encoding.trainable:
        assert encoding.centroid_dtype == "int8"
        return
    G = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([8, 0, 0, 3, 8])
    for read, g in [
        (lambda t: encoding.decode(t, ROWS, COLS), G),
        (lambda t: encoding.take(t, ids, ROWS, COLS), G[:5]),
    ]:
        c = tensors["centroids"].clone().float().requires_grad_()
        (read(tensors | {"centroids": c}) * g).sum().backward()
        # by hand: the weight is linear in every centroid
        expected = torch.zeros_like(c)
        with torch.no_grad():
            origin = read(tensors | {"centroids": torch.zeros_like(c)})
            for place in np.ndindex(*c.shape):
                one = torch.zeros_like(c)
                one[place] = 1.0
                expected[place] = ((read(tensors | {"centroids": one}) - origin) * g).sum()
        torch.testing.assert_close(c.grad, expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_may_lie_in_any_order():
    encoding, tensors, _ = CASES["pairs"]
    G, found = torch.randn(COLS, ROWS, generator=torch.Generator().manual_seed(1)), []
    for g in (G.T, G.T.contiguous()):
        c = tensors["centroids"].float().requires_grad_()
        encoding.decode(tensors | {"centroids": c}, ROWS, COLS).backward(g)
        found.append(c.grad)
    assert torch.equal(*found)


def test_only_packed_codes_are_kept_for_the_gradient():
    encoding, tensors, _ = draw(bits=2, clusters=4, rows=64, cols=256)
    kept = []
    c = tensors["centroids"].float().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        encoding.decode(tensors | {"centroids": c}, 64, 256)
    assert sum(kept) < 64 * 256 // 4 + 64 * 8 + 100


@given(st.integers(1, 400), st.floats(0, 1), st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_places_survive_in_little_room(weights, share, seed):
    places = (torch.rand(weights, generator=torch.Generator().manual_seed(seed)) < share).nonzero().flatten()
    tensors = store_outliers(places, weights)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in outlier_layout(len(places), weights).items()
    }
    assert torch.equal(load_outliers(tensors, len(places), weights), places)


def bits(encoding: Codebook, rows: int, cols: int) -> float:
    return encoding.nbytes(rows, cols, torch.bfloat16) * 8 / (rows * cols)


def test_bits_a_weight_count_everything():
    assert bits(Codebook(bits=3, clusters=8, dim=4), 64, 512) == 3 / 4 + 16 * 8 * 4 / (64 * 512)
    assert bits(Codebook(bits=4, clusters=16, scales="row"), 64, 512) == 4 + 16 / 512 + 16 * 16 / (64 * 512)
    assert (
        bits(Codebook(bits=4, clusters=16, rows_per_book=1, centroid_dtype="int8"), 64, 512) == 4 + (16 * 8 + 16) / 512
    )
    plain, weights = Codebook(bits=4, clusters=16), 1536 * 576
    apart = plain.model_copy(update={"outliers": weights // 200})
    extra = (bits(apart, 1536, 576) - bits(plain, 1536, 576)) * 200
    assert 25 < extra < 25.8  # bits an outlier, 16 of them its value


def test_int8_tables_round_to_the_nearest_of_255_levels():
    c = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    c[2] = 0.0
    stored = store_tables(c, "int8")
    back = stored["centroids"].float() * stored["centroid_scales"].float()[:, None]
    assert ((back - c).abs() <= 0.5005 * c.abs().amax(1, keepdim=True) / 127 * 1.001).all()
    assert (back[2] == 0).all()
    assert (stored["centroids"][[0, 1, 3, 4]].abs().amax(1) == 127).all()


def test_runs_of_a_pruned_weight_are_refused():
    with pytest.raises(ValidationError, match="set dim=1"):
        Codebook(bits=4, clusters=16, dim=2, survivors=10)
