"""What a teacher cache stores of a token: a few words and their probabilities, packed (RS-KD, arXiv:2503.16870).

    top k      words, log-probabilities in float16, the logarithm of what they lack of 1 (the tail), in float16
    sampled    n draws: which words (each once), and a bit a draw that says where the next word begins

Sorted, n draws are a row of runs, so that n bits hold the number of words and all their counts. A word's number takes
as many bits as the vocabulary needs, cut into bytes and a rest that `encodings/packing.py` packs: 18 bits for 151936.

    top k      k (b / 8 + 2) + 2 bytes a token          258 at k = 64 and 49152 words, 274 at 151936
    sampled    n / 8 + u b / 8 bytes a token            31 at n = 50, with u = 12 different words of 49152

Draws are small because a teacher is mostly sure: u grows with the temperature. A model of 512 words that reads stories
it knows has u = 9 at T = 1 (17 bytes a token) and u = 21 at T = 2 (31 bytes); with a large vocabulary keep to T = 1.

Shapes: ids [tokens, k or n], packed rows of bytes as they are in a file. Float16 rounds log-probabilities to 2^-11 of
themselves: reading divides by the new sum, so that words and tail are a distribution again.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from hf_slim.encodings.packing import pack, pack_mask, packed_bytes, unpack, unpack_mask


def pack_ids(ids: Int[Tensor, "*rows n"], vocabulary: int) -> UInt8[Tensor, "*rows b"]:
    """Numbers below `vocabulary`, in as few bits as it needs; rows are packed on their own."""
    planes = [pack((ids >> shift & (1 << bits) - 1).to(torch.uint8), bits) for shift, bits in _planes(vocabulary)]
    return torch.cat(planes, dim=-1)


def unpack_ids(packed: UInt8[Tensor, "*rows b"], vocabulary: int, count: int) -> Int[Tensor, "*rows n"]:
    """The `count` numbers of each packed row, as int64."""
    ids = torch.zeros(*packed.shape[:-1], count, dtype=torch.int64)
    start = 0
    for shift, bits in _planes(vocabulary):
        end = start + packed_bytes(count, bits)
        ids |= unpack(packed[..., start:end], bits, count).long() << shift
        start = end
    return ids


def ids_bytes(count: int, vocabulary: int) -> int:
    """Bytes of a packed row."""
    return sum(packed_bytes(count, bits) for _, bits in _planes(vocabulary))


def tail_of(log_p: Float[Tensor, "tokens k"]) -> Float[Tensor, " tokens"]:
    """The logarithm of what k probabilities lack of 1; -inf if nothing."""
    return torch.log1p(-log_p.double().exp().sum(1)).nan_to_num(nan=-torch.inf).to(log_p.dtype)


def renormalized(log_p: Float[Tensor, "tokens k"], tail: Float[Tensor, " tokens"]) -> Float[Tensor, "tokens k"]:
    """Rounded log-probabilities as those of a distribution whose rest is the tail; float32."""
    together = torch.cat([log_p.float(), tail.float().unsqueeze(1)], dim=1)
    return together.log_softmax(1)[:, :-1]


def pack_draws(ids: Int[Tensor, "tokens n"], vocabulary: int) -> tuple[UInt8[Tensor, "tokens m"], UInt8[Tensor, " b"]]:
    """Draws as the beginnings of runs of equal words, a row of bits each, and these words, all tokens in one row."""
    ids = ids.sort(dim=1).values
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return pack_mask(begins), pack_ids(ids[begins], vocabulary)


def words_of(begins: UInt8[Tensor, "tokens m"], draws: int) -> Int[Tensor, " tokens"]:
    """How many different words each token has."""
    return unpack_mask(begins, draws).sum(1)


def unpack_draws(
    begins: UInt8[Tensor, "tokens m"], packed: UInt8[Tensor, " b"], vocabulary: int, draws: int
) -> tuple[Int[Tensor, "tokens u"], Float[Tensor, "tokens u"]]:
    """Words and the share of the draws that each has; u is the most that one token has, missing ones have share 0."""
    runs = unpack_mask(begins, draws)
    words = runs.sum(1)
    most = int(words.max())
    counts = torch.zeros(len(runs), most).scatter_add_(1, runs.cumsum(1) - 1, torch.ones(len(runs), draws))
    ids = torch.zeros(len(runs), most, dtype=torch.int64)
    ids[torch.arange(most) < words.unsqueeze(1)] = unpack_ids(packed, vocabulary, int(words.sum()))
    return ids, counts / draws


def _planes(vocabulary: int) -> list[tuple[int, int]]:
    """Position and number of bits of each part of a word's number, of at most 8 bits."""
    total = max(1, (vocabulary - 1).bit_length())
    return [(shift, min(8, total - shift)) for shift in range(0, total, 8)]
