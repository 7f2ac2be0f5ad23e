"""Every encoding: what is announced is what is stored, and it decodes to what its docstring says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import encodings as oracle
from reference import hashed as hashing

from hf_slim.core.errors import ArtifactError
from hf_slim.encodings import KINDS, Affine, Codebook, Hashed, LowRank, Sparse, read_encoding
from hf_slim.encodings.codes import load_codes

ROWS, COLS = 6, 40
SHARES = (None, 1.0, 0.5, 0.0)  # of weights that pruning left; None: not pruned


def draw_keep(rows: int, cols: int, share: float | None, generator: torch.Generator) -> torch.Tensor | None:
    return None if share is None else torch.rand(rows, cols, generator=generator) < share


def affine(bits: int, group_size: int | None, symmetric: bool, share: float | None, shape=(ROWS, COLS)):
    """An encoding, its stored tensors, and the weight that they mean."""
    generator = torch.Generator().manual_seed(bits)
    keep = draw_keep(*shape, share, generator)
    encoding = Affine(
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        survivors=None if keep is None else int(keep.sum()),
    )
    groups = encoding.groups(shape[1])
    codes = torch.randint(0, 2**bits, shape, generator=generator).to(torch.uint8)
    scales = torch.randn(shape[0], groups, generator=generator).half()
    zeros = torch.randint(0, 2**bits, (shape[0], groups), generator=generator).to(torch.uint8)
    if symmetric:
        zeros.fill_(2 ** (bits - 1))
    tensors = encoding.pack(codes, scales, zeros, keep)
    return encoding, tensors, oracle.affine(codes.numpy(), scales.numpy(), zeros.numpy(), group_size, keep)


def centered(bits: int, group_size: int | None, share: float | None):
    """As above, with levels at odd multiples of half a scale."""
    plain, tensors, _ = affine(bits, group_size, True, share)
    encoding = plain.model_copy(update={"centered": True})
    codes, keep = load_codes(tensors, bits, ROWS, COLS, plain.survivors)
    odd, half = 2 * codes.numpy().astype(int) - (2**bits - 1), tensors["scales"].numpy() / 2
    return encoding, tensors, oracle.affine(odd, half, np.zeros(half.shape), group_size, keep)


def codebook(bits: int, rows_per_book: int | None, share: float | None, shape=(ROWS, COLS)):
    generator = torch.Generator().manual_seed(bits)
    keep = draw_keep(*shape, share, generator)
    clusters = 2**bits - (bits > 2)  # not always a full table
    encoding = Codebook(
        bits=bits,
        clusters=clusters,
        rows_per_book=rows_per_book,
        survivors=None if keep is None else int(keep.sum()),
    )
    codes = torch.randint(0, clusters, shape, generator=generator).to(torch.uint8)
    centroids = torch.randn(encoding.books(shape[0]), clusters, generator=generator).half()
    tensors = encoding.pack(codes, centroids, keep)
    return encoding, tensors, oracle.codebook(codes.numpy(), centroids.numpy(), rows_per_book, keep)


def sparse(share: float, dtype: torch.dtype, shape=(ROWS, COLS)):
    generator = torch.Generator().manual_seed(0)
    keep = draw_keep(*shape, share, generator)
    W = torch.randn(*shape, generator=generator).to(dtype)
    encoding = Sparse(survivors=int(keep.sum()))
    tensors = encoding.pack(W, keep)
    return encoding, tensors, W.float().where(keep, 0).numpy()


def hashed(buckets: int, block: int):
    encoding = Hashed(buckets=buckets, block=block, seed=3)
    values = torch.randn(buckets, block, generator=torch.Generator().manual_seed(0))
    return encoding, {"buckets": values}, hashing.decode(values.numpy(), ROWS, COLS, 3, {})


def low_rank(rank: int):
    """Factors of small whole numbers, whose product is exact in any order."""
    generator = torch.Generator().manual_seed(rank)
    A, B = (torch.randint(-4, 5, shape, generator=generator).float() for shape in ((ROWS, rank), (rank, COLS)))
    return LowRank(rank=rank), LowRank(rank=rank).pack(A, B), A.numpy() @ B.numpy()


CASES = {
    **{f"affine-{bits}-{size}-{share}": affine(bits, size, bits % 2 == 0, share)
       for bits in range(1, 9) for size in (None, 16, 64) for share in SHARES},
    **{f"centered-{bits}-{size}-{share}": centered(bits, size, share)
       for bits in (1, 2) for size in (None, 16) for share in SHARES},
    **{f"codebook-{bits}-{book}-{share}": codebook(bits, book, share)
       for bits in range(1, 9) for book in (None, 1, 4) for share in SHARES},
    **{f"sparse-{share}-{dtype}": sparse(share, dtype)
       for share in SHARES[1:] for dtype in (torch.float32, torch.bfloat16)},
    **{f"hashed-{block}": hashed(7, block) for block in (1, 16)},
    **{f"low-rank-{rank}": low_rank(rank) for rank in (1, 5)},
}  # fmt: skip
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def dense_dtype(tensors: dict[str, torch.Tensor]) -> torch.dtype:
    return tensors["values"].dtype if "values" in tensors else torch.float32


@each
def test_layout_is_what_pack_stores(case):
    encoding, tensors, _ = case
    layout = encoding.layout(ROWS, COLS, dense_dtype(tensors))
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in layout.items()
    }
    assert encoding.nbytes(ROWS, COLS, dense_dtype(tensors)) == sum(t.nbytes for t in tensors.values())
    assert not any(name == "weight" or name.endswith(".weight") for name in tensors)


@each
def test_decode_agrees_with_the_oracle(case):
    encoding, tensors, expected = case
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    decoded = encoding.decode(tensors, ROWS, COLS)
    np.testing.assert_array_equal(decoded.float().numpy(), expected)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)  # decoding works in place, but not there


@pytest.mark.parametrize("share", SHARES[1:])
def test_sparse_values_lie_row_by_row(share):
    _, tensors, expected = sparse(share, torch.float32)
    found = oracle.sparse(tensors["mask"].tolist(), tensors["values"].tolist(), COLS)
    np.testing.assert_array_equal(found, expected)


@each
def test_take_reads_the_same_rows(case):
    encoding, tensors, _ = case
    ids = torch.tensor([5, 0, 0, 3])
    assert torch.equal(encoding.take(tensors, ids, ROWS, COLS), encoding.decode(tensors, ROWS, COLS)[ids])
    assert encoding.take(tensors, ids[:0], ROWS, COLS).shape == (0, COLS)


@each
def test_description_survives_json(case):
    encoding, _, _ = case
    written = encoding.model_dump(mode="json", exclude_defaults=True) | {"kind": encoding.kind}
    assert read_encoding(written) == encoding
    assert read_encoding(encoding.model_dump(mode="json")) == encoding
    assert encoding.describe()


@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 25), st.integers(1, 30), st.booleans())
@settings(max_examples=60, deadline=None)
def test_affine_groups_of_any_size(bits, rows, cols, group_size, symmetric):
    encoding, tensors, expected = affine(bits, group_size, symmetric, None, (rows, cols))
    assert tensors["scales"].shape == (rows, -(-cols // group_size))
    np.testing.assert_array_equal(encoding.decode(tensors, rows, cols).numpy(), expected)


def bits_a_weight(encoding, rows: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> float:
    return encoding.nbytes(rows, cols, dtype) * 8 / (rows * cols)


def test_bits_a_weight_count_everything():
    assert bits_a_weight(Affine(bits=4, group_size=64), 64, 512) == 4.3125
    assert bits_a_weight(Affine(bits=4, group_size=64), 64, 576) == 4 + 16 / 64 + 40 / 576  # 9 x 4 bits are 5 bytes
    assert bits_a_weight(Affine(bits=4, group_size=64, symmetric=True), 64, 576) == 4 + 16 / 64
    assert bits_a_weight(Affine(bits=3, group_size=None, symmetric=True), 64, 576) == 3 + 16 / 576
    assert bits_a_weight(Codebook(bits=4, clusters=16, rows_per_book=4), 64, 576) == 4 + 16 * 16 / (4 * 576)
    assert bits_a_weight(Sparse(survivors=64 * 576 // 2), 64, 576) == 9.0
    assert bits_a_weight(Affine(bits=4, survivors=64 * 576 // 2), 64, 576) == 3 + (16 + 8) / 576


def test_half_sparse_bfloat16_takes_nine_bits():
    encoding, tensors, _ = sparse(0.5, torch.bfloat16, (200, 328))
    assert 8 * sum(t.nbytes for t in tensors.values()) / (200 * 328) <= 9.1
    assert encoding.lossless


def test_sparse_gradients_reach_the_survivors():
    encoding, tensors, _ = sparse(0.5, torch.float32)
    tensors["values"].requires_grad_()
    slope = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(1))
    (encoding.decode(tensors, ROWS, COLS) * slope).sum().backward()
    assert torch.equal(tensors["values"].grad, slope[encoding.decode(tensors, ROWS, COLS) != 0])


@pytest.mark.parametrize(
    ("description", "hint"),
    [
        ({"kind": "afine", "bits": 4}, "did you mean 'affine'?"),
        ({"kind": None}, "known: affine, codebook, hashed, low_rank, sparse"),
        ({}, "known: affine, codebook, hashed, low_rank, sparse"),
        ({"kind": "affine", "bits": 4, "group_sise": 64}, "did you mean 'group_size'?"),
        ({"kind": "affine", "bits": 9}, "bits"),
        ({"kind": "affine"}, "bits"),
        ({"kind": "affine", "bits": 3, "symmetric": True, "centered": True}, "1 or 2 bits"),
        ({"kind": "affine", "bits": 2, "centered": True}, "centered grids are symmetric"),
        ({"kind": "codebook", "bits": 2, "clusters": 5}, "clusters"),
    ],
)
def test_unreadable_descriptions_are_named(description, hint):
    with pytest.raises(ArtifactError) as caught:
        read_encoding(description)
    assert hint in str(caught.value)


def test_every_kind_is_covered():
    assert {encoding.kind for encoding, _, _ in CASES.values()} == set(KINDS)
