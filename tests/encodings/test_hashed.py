"""The hash is the same everywhere and even; what it decodes to, and its gradient, agree with a loop over entries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import hashed as oracle

from hf_slim.encodings import Hashed, read_encoding
from hf_slim.encodings.hashed import hash_places

CASES = [  # rows, cols, buckets, block, seed, exact rows
    (6, 40, 7, 1, 0, ()),
    (6, 40, 5, 16, 3, ()),  # the last chunk is shorter
    (5, 24, 40, 8, 2**32 - 1, ()),  # more buckets than chunks: some hold nothing
    (7, 20, 1, 8, 1, ()),
    (9, 20, 4, 8, 5, (0, 3, 8)),
    (4, 20, 3, 20, 0, (0, 1, 2)),
]
each = pytest.mark.parametrize("case", CASES, ids=str)


def make(case, gradient="sum", dtype=torch.float32):
    """An encoding, its stored tensors, and the rows that are exact."""
    rows, cols, buckets, block, seed, exact = case
    generator = torch.Generator().manual_seed(0)
    encoding = Hashed(buckets=buckets, block=block, seed=seed, exact=len(exact), gradient=gradient)
    tensors = {"buckets": torch.randn(buckets, block, generator=generator).to(dtype)}
    if exact:
        tensors["exact"] = torch.randn(len(exact), cols, generator=generator).to(dtype)
        tensors["exact_ids"] = torch.tensor(exact, dtype=torch.int32)
    return encoding, tensors, rows, cols, dict(zip(exact, tensors.get("exact", torch.zeros(0)).numpy(), strict=True))


def test_hashes_are_these_numbers_on_every_machine():
    assert oracle.mix(1) == 0x514E28B7  # known as MurmurHash3's 32-bit hash of nothing with seed 1
    assert hash_places(torch.tensor([0, 1, 123_456]), 3, 0).tolist() == [
        [0, 0x514E28B7, 0x30F4C306],
        [0x2FEF5C8F, 0x3D8ED02F, 0x2E7DCC10],
        [0x268E48CD, 0x69148972, 0x172500ED],
    ]
    encoding = Hashed(buckets=1000, block=4, seed=7)
    bucket, sign = encoding.places(torch.tensor([2, 3]), 10)
    assert bucket.tolist() == [[914, 921, 421], [93, 929, 828]]
    assert sign.tolist() == [[-1, 1, 1], [-1, 1, 1]]


@each
def test_decodes_to_what_a_loop_over_entries_finds(case):
    encoding, tensors, rows, cols, exact = make(case)
    expected = oracle.decode(tensors["buckets"].numpy(), rows, cols, encoding.seed, exact)
    np.testing.assert_array_equal(encoding.decode(tensors, rows, cols).numpy(), expected)


@each
def test_rows_and_runs_are_read_without_the_rest(case, monkeypatch):
    encoding, tensors, rows, cols, _ = make(case)
    W = encoding.decode(tensors, rows, cols)
    ids = torch.tensor([rows - 1, 0, 0, 2])
    assert torch.equal(encoding.take(tensors, ids, rows, cols), W[ids])
    assert encoding.take(tensors, ids[:0], rows, cols).shape == (0, cols)
    monkeypatch.setattr("hf_slim.encodings.hashed.row_runs", lambda r, c: iter([slice(0, 2), slice(2, r)]))
    runs = list(encoding.runs(tensors, rows, cols))
    assert torch.equal(torch.cat([run for _, run in runs]), W)


@each
def test_layout_is_what_is_stored(case):
    encoding, tensors, rows, cols, _ = make(case, dtype=torch.bfloat16 if case[0] == 7 else torch.float32)
    layout = encoding.layout(rows, cols, tensors["buckets"].dtype)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {n: tuple(s) for n, s in layout.items()}
    assert encoding.nbytes(rows, cols, tensors["buckets"].dtype) == sum(t.nbytes for t in tensors.values())
    written = encoding.model_dump(mode="json", exclude_defaults=True) | {"kind": encoding.kind}
    assert read_encoding(written) == encoding
    assert encoding.describe()


@each
@pytest.mark.parametrize("kind", ["sum", "mean"])
def test_gradient_is_the_signed_sum_over_members_or_their_mean(case, kind):
    encoding, tensors, rows, cols, exact = make(case, kind)
    trained = {n: t.clone().requires_grad_() if t.is_floating_point() else t for n, t in tensors.items()}
    G = torch.randn(rows, cols, generator=torch.Generator().manual_seed(1))
    (encoding.decode(trained, rows, cols) * G).sum().backward()
    total, members = oracle.gradient(G.numpy(), tuple(tensors["buckets"].shape), encoding.seed, set(exact))
    expected = total if kind == "sum" else total / members.clip(min=1)
    np.testing.assert_allclose(trained["buckets"].grad.numpy(), expected, rtol=1e-4, atol=1e-5)
    ids = tensors.get("exact_ids", torch.zeros(0)).long()
    np.testing.assert_array_equal(encoding.members(rows, cols, ids).numpy(), members)
    if exact:
        assert torch.equal(trained["exact"].grad, G[ids])


@pytest.mark.parametrize(("rows", "chunks", "seed"), [(1, 65536, 0), (65536, 1, 0), (256, 256, 9), (4096, 18, 1)])
def test_buckets_fill_evenly_and_signs_cancel(rows, chunks, seed):
    bucket, sign = Hashed(buckets=101, block=1, seed=seed).places(torch.arange(rows), chunks)
    n = bucket.numel()
    counts = torch.bincount(bucket.flatten(), minlength=101).double()
    chi2 = ((counts - n / 101).square() / (n / 101)).sum().item()
    assert abs(chi2 - 100) < 5 * (2 * 100) ** 0.5
    assert set(sign.unique().tolist()) == {-1, 1}
    assert abs(sign.sum().item()) < 4 * n**0.5
    sums = torch.zeros(101, dtype=torch.long).index_add_(0, bucket.flatten(), sign.flatten())
    assert (sums.abs() < 5 * counts.sqrt()).all()  # signs are even in every bucket


@pytest.mark.parametrize("other", [1, 2, 2**31])
def test_seeds_give_unrelated_places(other):
    rows = torch.arange(300)
    (a, sign_a), (b, sign_b) = (Hashed(buckets=50, block=1, seed=s).places(rows, 100) for s in (0, other))
    assert abs((a == b).double().mean().item() - 1 / 50) < 5 * (1 / 50 / a.numel()) ** 0.5
    assert abs((sign_a * sign_b).sum().item()) < 5 * a.numel() ** 0.5


def test_rows_do_not_share_their_places():
    """Of rows that are alike up to sign none is found: a table of tokens would confuse them."""
    bucket, _ = Hashed(buckets=64, block=16).places(torch.arange(2000), 16 * 8)
    assert len(bucket.unique(dim=0)) == 2000
