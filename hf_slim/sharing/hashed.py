"""Weight sharing by hashing: weights that share a value are picked at random, by a hash, and training makes the best of
it (Chen et al. 2015, "HashedNets", arXiv:1504.04788).

    W[r, block c + p] = sign(r, c) buckets[bucket(r, c), p]                    (`encodings/hashed.py`)

Nothing but the buckets is stored, so sizes below one bit a weight need no entropy coder; and the buckets are ordinary
parameters, which every trainer trains. Of a weight W with n entries and K = n / compression stored values, the values
of least squared error are means,

    b[k] = sum over members i of sign_i W_i / m_k,          |W_hat|^2 = sum over k of m_k b[k]^2

and for weights without structure E |W_hat|^2 = |W|^2 (filled buckets) / n, about 1 / compression. That is little: a
hashed model says nothing until it has been trained, and the plan tells so where no stage trains it.

Where we differ from the paper, which trains from scratch: values start at the pretrained weight's means; signs and
places belong to chunks of `block` weights; embeddings are hashed too, all but the rows of the most frequent tokens.

Held-out perplexity of a Llama of 260,000 weights trained on TinyStories (5.38; 226,560 of its weights are hashed) after
200 steps of distillation on 8 windows of 128 tokens, against a dense student that was cut out of the same model (fewest
heads and the neurons of largest norm, as many weights as are stored; `scripts/bench_hashing.py`, one seed, two rates of
learning at 16 times for both, the better one shown):

    compression                        4       8       16
    hashed, blocks of 32             25.0    32.2    35.7
    blocks of 1                              32.7
    norm restored                            37.8
    dense, cut                       15.5    21.7    29.4

Longer blocks cost nothing here, and restoring the norm, whose error is larger, does not pay. The rival stays ahead, by
less the smaller both are: 1.6 times at 4, 1.2 at 16. At 64 times, trained for 800 steps, hashing is ahead, as in the
paper: blocks of 1 (3540 stored values) come to 23.6 and 24.2 in two seeds, one dense block (3392 weights, all that can
be made of so few) to 32.1 and 28.4; learning rate 0.01, the best of three on other text, for the dense one, 0.004 for
hashing, where 0.008 was better still (20.1 against 23.7). In blocks of 32 it comes to 29.3 (one seed, best of two
rates): at high compression take `block: 1`. At 16 times a dense cut with as many steps comes to 15.4.

Of nets with one hidden layer that learn from scratch which token of TinyStories follows 8 others, 15 neurons with
weights of their own reach a perplexity of 41.4, and 1000 that share as many numbers, 64 weights each, 55.6
(`scripts/bench_hashednets.py`, 1000 steps, one seed, the best of three learning rates for both).

Shapes: W [rows, cols]; buckets [K / block, block]; exact_ids int64 [exact], ascending. Time O(n), memory O(n).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.layers import Encoded, plan_targets, put_layer
from hf_slim.core.method import MethodConfig, Rules
from hf_slim.core.report import StageReport
from hf_slim.core.select import Layer, Select
from hf_slim.core.swap import get_weight
from hf_slim.encodings import Hashed
from hf_slim.encodings.affine import row_runs
from hf_slim.encodings.hashed import WORD, Gradient, all_but

RULES = Rules(preserves=("zeros", "codes", "tied"), wants_training=True, paper="Chen et al. 2015, arXiv:1504.04788")


class Embeddings(MethodConfig):
    """How the input embedding is hashed, and with it a head that shares it."""

    compression: float = Field(8, ge=1, description="weights of the hashed rows that share a stored value")
    exact: int = Field(1024, ge=0, description="tokens whose rows are kept as they are")
    by: Literal["frequency", "id"] = Field(
        "frequency", description="which: the most frequent in the calibration data, or those of the lowest ids"
    )


class Config(MethodConfig):
    """Options of `share.hashed`."""

    per_layer: ClassVar[tuple[str, ...]] = ("compression", "block")

    compression: float = Field(8, ge=1, description="weights that share a stored value")
    block: int = Field(32, ge=1, description="weights side by side that are hashed as one; 1 is the paper's")
    hash_seed: int = Field(0, ge=0, le=WORD, description="decides which weights share a value")
    gradient: Gradient = Field(
        "sum", description="of a stored value: 'sum' over its members, or their 'mean' (for SGD)"
    )
    restore_norm: bool = Field(False, description="scale the means until the weight has its former norm")
    layers: Select = Select()
    embeddings: Embeddings | None = Field(None, description="hash the input embedding (and a tied head) too")


def least_squares(
    W: Float[Tensor, "rows cols"],
    encoding: Hashed,
    exact_ids: Int[Tensor, " exact"] | None = None,
    restore_norm: bool = False,
) -> dict[str, Tensor]:
    """Stored tensors of least squared error.

    Args:
        W: the weight; all zero or constant rows are nothing special.
        encoding: says how many values there are, and where they go. A bucket without members holds zeros.
        exact_ids: the rows that are kept as they are, ascending; `encoding.exact` of them.
        restore_norm: scale the values so that the hashed rows have the norm that they had; the error grows.

    Returns:
        The tensors of `encoding.layout`, in the dtype of W.
    """
    rows, cols = W.shape
    hashed = all_but(exact_ids, rows, W.device)
    total = torch.zeros(encoding.buckets, encoding.block, device=W.device)
    for run in row_runs(rows, cols):
        ids = hashed[(hashed >= run.start) & (hashed < run.stop)]
        bucket, sign = encoding.places(ids, cols)
        chunks = F.pad(W[ids].float(), (0, -cols % encoding.block)).unflatten(1, (-1, encoding.block))
        total.index_add_(0, bucket.flatten(), (chunks * sign[..., None]).flatten(0, 1))
    members = encoding.members(rows, cols, exact_ids, W.device)
    means = total / members.clamp(min=1)
    if restore_norm and (power := (members * means.square()).sum()) > 0:
        means *= (W[hashed].float().square().sum() / power).sqrt()
    tensors = {"buckets": means.to(W.dtype)}
    if exact_ids is not None:
        tensors |= {"exact": W[exact_ids].clone(), "exact_ids": exact_ids.to(torch.int32)}
    return tensors


def most_frequent(tokens: Int[Tensor, "samples length"], count: int, vocabulary: int) -> Int[Tensor, " count"]:
    """Ids of the most frequent tokens, ascending; of two that are as frequent, the lower one goes first."""
    often = torch.bincount(tokens.flatten(), minlength=vocabulary).argsort(descending=True, stable=True)
    return often[:count].sort().values


def encoding(layer: Layer, config: Config) -> Hashed:
    """How a layer will be stored."""
    compression, block, exact = _settings(layer, config)
    buckets = int((layer.rows - exact) * layer.cols / (compression * block))
    return Hashed(buckets=buckets, block=block, seed=config.hash_seed, exact=exact, gradient=config.gradient)


def problems(layer: Layer, config: Config) -> list[str]:
    """Why a layer cannot be hashed."""
    compression, block, exact = _settings(layer, config)
    hashed, found = layer.rows - exact, []
    if layer.survivors is not None:
        found.append(
            f"{layer.name} is pruned, and its zeros would share values with other weights: name it in layers.exclude"
        )
    if hashed <= 0:
        found.append(f"embeddings.exact: {layer.name} has {layer.rows} rows, and {exact} are to be kept: keep fewer")
    elif hashed * layer.cols < compression * block:
        found.append(
            f"{layer.name}: {hashed} x {layer.cols} weights compressed {compression:g} times are fewer than one bucket "
            f"of {block}: lower compression or block, or name it in layers.exclude"
        )
    return found


def needs(config: Config) -> tuple[str, ...]:
    """Calibration data, to count tokens in."""
    return ("calibration",) if _counts_tokens(config) else ()


def encode(W: Float[Tensor, "rows cols"], layer: Layer, config: Config, keep: Tensor | None) -> Encoded:
    """Hash one weight; the rows kept exact are those of the lowest ids."""
    return _encode(W, layer, config, None)


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Hash the chosen layers of a model."""
    chosen = plan_targets(model, "share.hashed", config)
    tokens = context.tokens("calibration") if _counts_tokens(config) else None
    rows = []
    for layer in context.progress.track(chosen, "hashing layers"):
        W = get_weight(model.get_submodule(layer.name))
        rows.append(put_layer(model, layer, _encode(W, layer, config, tokens)))
    return StageReport(layers=rows, notes=["the model has to be trained now, by distill.logits or otherwise"])


def _encode(W: Float[Tensor, "rows cols"], layer: Layer, config: Config, tokens: Tensor | None) -> Encoded:
    stored, exact_ids = encoding(layer, config), None
    if stored.exact:
        ids = torch.arange(stored.exact) if tokens is None else most_frequent(tokens, stored.exact, layer.rows)
        exact_ids = ids.to(W.device)
    return stored, least_squares(W, stored, exact_ids, config.restore_norm)


def _settings(layer: Layer, config: Config) -> tuple[float, int, int]:
    """Compression, weights in a chunk, and rows kept exact, of one layer."""
    here = config.at(layer)
    block = min(here.block, layer.cols)
    if layer.kind == "embedding" and config.embeddings is not None:
        return config.embeddings.compression, block, config.embeddings.exact
    return here.compression, block, 0


def _counts_tokens(config: Config) -> bool:
    return config.embeddings is not None and config.embeddings.exact > 0 and config.embeddings.by == "frequency"
