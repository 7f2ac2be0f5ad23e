"""Row scales, int8 tables, outliers, and tables with fewer entries: what is stored, and what it gains."""

from __future__ import annotations

import pytest
import tiny
import torch

import hf_slim
from hf_slim.core.errors import SlimError
from hf_slim.core.select import find_layers
from hf_slim.encodings import Codebook
from hf_slim.encodings.codebook import as_stored
from hf_slim.sharing import intervals
from hf_slim.sharing.intervals import cluster, nearest
from hf_slim.sharing.kmeans import Config, encoding, heaviest, quantize, quantize_scaled, solve

ROWS, COLS = 24, 60


def weight(seed: int = 0) -> torch.Tensor:
    """Rows of different size, with heavy tails."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, COLS, generator=g) ** 3 * torch.rand(ROWS, 1, generator=g) * 0.1


def error(W: torch.Tensor, stored: Codebook, h: torch.Tensor | float = 1.0, **options) -> float:
    found, tensors = solve(W, stored, **options)
    return (h * (W - found.decode(tensors, *W.shape)) ** 2).sum().item()


def book(bits: int = 3, **options) -> Codebook:
    return Codebook(bits=bits, clusters=2**bits, **options)


@pytest.mark.parametrize("weighted", [False, True])
def test_row_scales_let_rows_share_a_table(weighted):
    W = weight()
    h = torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) if weighted else None
    by = 1.0 if h is None else h
    assert error(W, book(scales="row"), by, weights=h) < 0.7 * error(W, book(), by, weights=h)


def test_scales_are_fitted_to_the_codes():
    W = weight()
    codes, c, s = quantize_scaled(W, 2)
    values = c[0][codes.long()]
    best = (W * values).sum(1) / values.square().sum(1)  # for these codes; they were chosen once more after the fit
    ours, fitted = (((W - scale[:, None] * values) ** 2).sum() for scale in (s, best))
    assert fitted <= ours <= 1.02 * fitted
    assert torch.equal(s.half().float(), s)
    assert torch.equal(nearest(W / s[:, None], c.expand(ROWS, -1)), codes)


def test_int8_tables_cost_little_and_codes_are_nearest_for_them():
    W = weight()
    plain, small = book(4, rows_per_book=4), book(4, rows_per_book=4, centroid_dtype="int8")
    assert small.nbytes(ROWS, COLS, W.dtype) < plain.nbytes(ROWS, COLS, W.dtype)
    assert error(W, small) < 1.1 * error(W, plain)
    codes, c = quantize(W, 4, 4, centroid_dtype=torch.int8)
    assert torch.equal(as_stored(c, torch.int8), c)
    assert torch.equal(nearest(W.view(6, -1), c).view_as(codes), codes)


def test_outliers_come_back_exactly_and_help_the_rest():
    W = weight().bfloat16().float()
    stored = book(3, outliers=14)
    found, tensors = solve(W, stored)
    apart = heaviest(W, 14)
    assert torch.equal(found.decode(tensors, ROWS, COLS)[apart], W[apart].half().float())
    rest = (~apart).float()
    assert error(W, stored, rest) < 0.8 * error(W, book(3), rest)


def test_the_heaviest_are_those_that_would_cost_most():
    W = torch.tensor([[1.0, -3.0, 2.0], [0.0, 3.0, -0.5]])
    assert heaviest(W, 2).tolist() == [[False, True, False], [False, True, False]]
    h = torch.tensor([[100.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    assert heaviest(W, 2, h).tolist() == [[True, True, False], [False, False, False]]


@pytest.mark.parametrize("survivors", [True, False])
@pytest.mark.parametrize("options", [{"scales": "row"}, {"centroid_dtype": "int8"}, {"outliers": 9}])
def test_pruned_weights_stay_zero(survivors, options):
    W = weight()
    keep = torch.rand(W.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    stored = book(3, survivors=int(keep.sum()) if survivors else None, **options)
    found, tensors = solve(W, stored, keep)
    Q = found.decode(tensors, ROWS, COLS)
    assert (Q[~keep] == 0).all()
    assert ((W - Q)[keep] ** 2).sum() < 0.2 * (W[keep] ** 2).sum()


@pytest.mark.parametrize(("values", "bits", "clusters"), [(1, 1, 1), (3, 2, 3), (9, 4, 9), (16, 4, 16), (40, 4, 16)])
def test_no_more_entries_are_stored_than_there_are_values(values, bits, clusters):
    W = torch.arange(1.0, values + 1)[torch.arange(ROWS * COLS) % values].view(ROWS, COLS)
    found, tensors = solve(W, book(4))
    assert (found.bits, found.clusters) == (bits, clusters)
    assert found.nbytes(ROWS, COLS, W.dtype) == sum(t.nbytes for t in tensors.values())
    if values <= 16:
        assert torch.equal(found.decode(tensors, ROWS, COLS), W)


def test_values_that_rounding_moves_keep_their_code():
    W = torch.full((ROWS, COLS), 0.3)  # float16 holds a little less
    W[1] = -0.7
    for dtype in ("float16", "bfloat16", "int8"):
        found, tensors = solve(W, book(4, centroid_dtype=dtype))
        assert (found.clusters, found.bits) == (2, 1)
        torch.testing.assert_close(found.decode(tensors, ROWS, COLS), W, rtol=1e-2, atol=0)


@pytest.mark.parametrize("options", [{}, {"scales": "row"}, {"centroid_dtype": "int8"}, {"outliers": 3}])
def test_rows_of_zeros_and_constant_ones_are_kept(options):
    W = torch.zeros(ROWS, COLS)
    W[1], W[2] = 0.5, -0.25
    found, tensors = solve(W, book(3, **options))
    torch.testing.assert_close(found.decode(tensors, ROWS, COLS), W, rtol=1e-2, atol=0)
    assert (found.decode(tensors, ROWS, COLS)[3:] == 0).all()
    found, tensors = solve(torch.zeros(ROWS, COLS), book(3, **options))
    assert (found.decode(tensors, ROWS, COLS) == 0).all()


def test_nan_is_refused():
    W = weight()
    W[3, 4] = torch.nan
    for options in ({}, {"scales": "row"}, {"outliers": 4}):
        with pytest.raises(SlimError, match="NaN"):
            solve(W, book(3, **options))


@pytest.mark.parametrize("clusters", [2, 5, 16, 256])
def test_bins_find_the_same_codes(clusters, monkeypatch):
    x = torch.randn(3, 4000, generator=torch.Generator().manual_seed(0)) ** 3
    c, _ = cluster(x, clusters)
    x[:, :300] = ((c[:, 1:] + c[:, :-1]) / 2).repeat(1, 300)[:, :300]  # on the limits
    plain = nearest(x, c)
    monkeypatch.setattr(intervals, "LONG", 1)
    assert torch.equal(nearest(x, c), plain)


def test_importances_of_any_range_are_solved():
    """Squared gradients span many powers of ten: sums of them must not swallow the small ones by half."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 500, generator=g)
    h = 10.0 ** (-30 * torch.rand(4, 500, generator=g))
    c, codes = cluster(x, 8, h)
    ours = (h.double() * (x - c.gather(1, codes.long())).double() ** 2).sum(1)
    by_size = cluster(x, 8)
    plain = (h.double() * (x - by_size[0].gather(1, by_size[1].long())).double() ** 2).sum(1)
    assert (ours < plain).all()


def test_the_plan_says_what_options_ask_for():
    layer = next(layer for layer in find_layers(tiny.llama()).values() if layer.name.endswith("q_proj"))
    stored = encoding(layer, Config(bits=2, scope="tensor", scales="row", centroids="int8", outliers=0.01))
    assert (stored.clusters, stored.rows_per_book, stored.scales, stored.centroid_dtype) == (4, None, "row", "int8")
    assert stored.outliers == int(0.01 * layer.rows * layer.cols)


@pytest.mark.parametrize("scope", ["row", 1])
def test_a_scale_for_a_table_of_the_rows_own_is_refused(scope):
    with pytest.raises(ValueError, match="scope"):
        Config(scope=scope, scales="row")


def test_a_model_with_everything_saves_and_loads(tmp_path):
    model = tiny.llama()
    report = hf_slim.compress(
        model, "share.kmeans", bits=3, scope="tensor", scales="row", centroids="int8", outliers=0.02,
        embeddings={"bits": 5, "scales": "row"},
    )  # fmt: skip
    assert all("row scales, int8 tables" in row.encoding for row in report.layers)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(tiny.ids(1, 6)).logits, model(tiny.ids(1, 6)).logits)


def test_the_report_says_where_fewer_entries_were_enough():
    model = tiny.llama()
    for name, parameter in model.named_parameters():
        if "q_proj" in name:
            parameter.data = parameter.data.sign()
    report = hf_slim.compress(model, "share.kmeans", bits=3, scope="tensor")
    said = [note for note in report.notes if "2 clusters / tensor instead of 8 clusters / tensor" in note]
    assert len(said) == sum("q_proj" in row.name for row in report.layers) > 0
