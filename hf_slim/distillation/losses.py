"""Distillation losses over tokens, of logits: sums of row losses, each with its gradient in closed form.

With T the temperature, p = softmax(t / T) of the teacher's logits t, q = softmax(s / T) of the student's logits s,
and D one of `divergences.py`, per kept token

    divergence    T² D(p, q)                          dL/ds = T dD/dz          z = s / T
    top-k         T² KL over k words and "the rest"   dL/ds = T (q - p) on the k, T q (1 - p_rest / q_rest) elsewhere
    sampled       -T² Σ_i w_i log q(v_i)              dL/ds = T (q Σ_i w_i - Σ_i w_i onehot(v_i))
    label loss    -log softmax(s)[y]                  dL/ds = softmax(s) - onehot(y)

all in nats; T² keeps the size of the gradients when the temperature changes (Hinton et al. 2015, arXiv:1503.02531).
A *row loss* gives these for a chunk of rows. Losses are *sums* over the kept tokens, each times its own weight if there
are weights: only the caller knows how many tokens the whole batch holds, over all micro-batches and all processes.

Shapes: logits [tokens, vocab], keep [tokens]. Tokens that are not kept neither count nor receive a gradient.

Where we differ from an autograd one-liner, and why: a batch of 8192 tokens over 150 000 words is 5 GB in fp32, and
autograd would hold five such arrays. Losses and gradient are computed here together, a chunk of tokens at a time in
fp32 (fp64 for fp64 input); what survives is one gradient in the dtype of the student's logits, whatever the number of
losses. `fused.py` does without that one, too. No second derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import log_softmax, pad

from hf_slim.distillation.divergences import Divergence, RowKernel, row_kernel

RowLoss: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(logits [rows, vocab], numbers of the tokens [rows]) -> (loss [rows], gradient [rows, vocab])."""
Term: TypeAlias = tuple[float, RowLoss]
"""A loss and its weight in the total."""

IGNORED = -100  # the label that transformers and torch give to a position without a target
WEIGHTS = "loss_weights"
"""Column of weights, one a label: how much predicting it counts beside the others."""

# 2**23 fp32 numbers (32 MiB) a temporary: large enough to keep the cores busy, small beside any batch of logits
_CHUNK_ELEMENTS = 2**23
# of these, temporaries of 1 MiB: a kernel of ten passes over them reads from the cache of a core, not from memory
_CACHED_ELEMENTS = 2**18


def positions(
    shape: tuple[int, ...],
    labels: Int[Tensor, "*batch"] | None = None,
    attention_mask: Tensor | None = None,
    *,
    shift: bool,
) -> tuple[Int[Tensor, " tokens"] | None, Bool[Tensor, " tokens"]]:
    """Target and weight of each position, the same whatever the padding.

    A position counts if it has a target (where labels are given) and is no padding itself (where a mask is given).

    Args:
        shape: shape of the logits without the vocabulary: [batch, sequence], or [batch] for sequence classification.
        labels: class indices of that shape; -100 marks a position without a target.
        attention_mask: nonzero where the input is real, of that shape.
        shift: True if the output at position i predicts label i + 1 (causal language models).

    Returns:
        targets [tokens] (None without labels) and keep [tokens], with tokens = prod(shape).
    """
    targets, keep = None, None
    if labels is not None:
        targets = pad(labels[:, 1:], (0, 1), value=IGNORED) if shift else labels
        keep = targets != IGNORED
    if attention_mask is not None:
        real = attention_mask != 0
        keep = real if keep is None else keep & real
    if keep is None:
        keep = torch.ones(shape, dtype=torch.bool)
    return None if targets is None else targets.reshape(-1), keep.reshape(-1)


def kl_divergence(
    student: Float[Tensor, "tokens vocab"],
    teacher: Float[Tensor, "tokens vocab"],
    keep: Bool[Tensor, " tokens"],
    temperature: float = 1.0,
    divergence: Divergence = "forward_kl",
    *,
    beta: float = 0.5,
    skew: float = 0.1,
    weights: Float[Tensor, " tokens"] | None = None,
) -> Float[Tensor, ""]:
    """Sum over kept tokens of T² D, in nats; 0 if and only if both distributions agree on every kept token.

    Args:
        student: logits that receive the gradient.
        teacher: logits taken as constants; -inf is allowed and means probability zero.
        keep: True for the tokens that count.
        temperature: T > 0, divides both logits.
        divergence: "forward_kl" is KL(teacher || student), "reverse_kl" is KL(student || teacher); see `divergences`.
        beta: of "jsd" alone, the teacher's share of the mixture.
        skew: of skewed divergences alone, the share mixed in.
        weights: of the tokens; 1 if not given.
    """
    loss = against_teacher(lambda tokens: teacher[tokens], temperature, divergence, beta=beta, skew=skew)
    return sum_over_logits(student, keep, [(1.0, loss)], weights)[0]


def label_cross_entropy(
    student: Float[Tensor, "tokens vocab"],
    targets: Int[Tensor, " tokens"],
    keep: Bool[Tensor, " tokens"],
    *,
    weights: Float[Tensor, " tokens"] | None = None,
) -> Float[Tensor, ""]:
    """Sum over kept tokens of the cross entropy with the labels, in nats, at temperature 1.

    Args:
        student: logits that receive the gradient.
        targets: class indices, 0 <= target < vocab wherever `keep` is True.
        keep: True for the tokens that count.
        weights: of the tokens; 1 if not given.
    """
    return sum_over_logits(student, keep, [(1.0, against_labels(targets))], weights)[0]


def against_teacher(
    teacher: Callable[[Tensor], Tensor],
    temperature: float = 1.0,
    divergence: Divergence = "forward_kl",
    *,
    beta: float = 0.5,
    skew: float = 0.1,
) -> RowLoss:
    """Row loss T² D(teacher, student).

    Args:
        teacher: gives the teacher's logits [rows, vocab] of some tokens [rows], wherever it has them from.
        temperature: T > 0, divides both logits.
        divergence: a name of `divergences.DIVERGENCES`; `beta` and `skew` as in `divergences.row_kernel`.
    """
    return against_mixture(teacher, [(1.0, temperature, row_kernel(divergence, beta, skew))])


def against_mixture(teacher: Callable[[Tensor], Tensor], parts: Sequence[tuple[float, float, RowKernel]]) -> RowLoss:
    """Row loss Σ_i w_i T_i² D_i(teacher, student); the teacher is asked once for all of them.

    Args:
        teacher: gives the teacher's logits [rows, vocab] of some tokens [rows], wherever it has them from.
        parts: weight w, temperature T > 0 and kernel of each divergence, at least one.
    """

    def row_loss(s: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        t = teacher(tokens).to(s.device, s.dtype)
        loss, gradient = s.new_empty(len(s)), torch.empty_like(s)
        for rows in _cached_rows(s):
            for i, (weight, temperature, kernel) in enumerate(parts):
                value, slope = kernel(_log_softmax(t[rows], temperature), _log_softmax(s[rows], temperature))
                if i == 0:
                    torch.mul(value, weight * temperature**2, out=loss[rows])
                    torch.mul(slope, weight * temperature, out=gradient[rows])
                else:
                    loss[rows].add_(value, alpha=weight * temperature**2)
                    gradient[rows].add_(slope, alpha=weight * temperature)
        return loss, gradient

    return row_loss


def against_labels(targets: Int[Tensor, " tokens"]) -> RowLoss:
    """Row loss: cross entropy with labels, at temperature 1."""

    def row_loss(s: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        log_q = log_softmax(s, dim=-1)
        y = targets.to(s.device)[tokens].unsqueeze(1)
        loss = -log_q.gather(1, y).squeeze(1)
        return loss, log_q.exp_().scatter_add_(1, y, log_q.new_full((), -1.0).expand_as(y))

    return row_loss


def against_top_k(ids: Int[Tensor, "tokens k"], log_p: Float[Tensor, "tokens k"], temperature: float = 1.0) -> RowLoss:
    """Row loss T² KL over k words of the teacher's and one bucket for all others, which keeps q from forgetting them.

    Without the bucket the student would be taught that the k words hold all probability there is (arXiv:2503.16870).

    Args:
        ids: the words, different ones in a row.
        log_p: the teacher's log-probabilities of these, at the same temperature. The rest of 1 belongs to the bucket.
        temperature: T > 0, divides the student's logits.
    """

    def row_loss(s: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        log_q, words = _log_softmax(s, temperature), ids.to(s.device)[tokens]
        kept = log_p.to(s.device)[tokens].to(s.dtype)
        p, p_rest = kept.exp(), (1 - kept.exp().sum(1)).clamp_(min=0)
        log_rest = log_q.scatter(1, words, -torch.inf).logsumexp(1)  # of 1 - Σ q little would be left by rounding
        loss = (p * (kept - log_q.gather(1, words))).masked_fill_(p == 0, 0.0).sum(1)
        nothing = (p_rest == 0) | (log_rest == -torch.inf)  # k may be all words there are
        rest = (p_rest * (p_rest.log() - log_rest)).masked_fill_(nothing, 0.0)
        on_words = log_q.gather(1, words).exp_().sub_(p)
        # q (1 - p_rest / q_rest), as a difference of exponentials: q_rest may be too small to divide by
        of_rest = (log_q - log_rest.unsqueeze(1)).exp_().mul_(p_rest.unsqueeze(1))
        of_rest.masked_fill_(nothing.unsqueeze(1), 0.0)
        gradient = log_q.exp_().sub_(of_rest).scatter_(1, words, on_words)
        return (loss + rest) * temperature**2, gradient.mul_(temperature)

    return row_loss


def against_samples(
    ids: Int[Tensor, "tokens draws"], shares: Float[Tensor, "tokens draws"], temperature: float = 1.0
) -> RowLoss:
    """Row loss: T² cross entropy with words drawn from the teacher (random sampling distillation, arXiv:2503.16870).

    Its gradient is, in the mean over draws, that of forward KL; its value is larger by the teacher's entropy.

    Args:
        ids: words, which may repeat.
        shares: weight of each: 1 / draws, or more generally p / (draws · proposal); see `sampling.draw`.
        temperature: T > 0, divides the student's logits.
    """

    def row_loss(s: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        log_q, words = _log_softmax(s, temperature), ids.to(s.device)[tokens]
        w = shares.to(s.device)[tokens].to(s.dtype)
        loss = -(w * log_q.gather(1, words)).sum(1)
        gradient = log_q.exp_().mul_(w.sum(1, keepdim=True)).scatter_add_(1, words, -w)
        return loss * temperature**2, gradient.mul_(temperature)

    return row_loss


def sum_over_logits(
    student: Float[Tensor, "tokens vocab"],
    keep: Bool[Tensor, " tokens"],
    terms: Sequence[Term],
    weights: Float[Tensor, " tokens"] | None = None,
) -> Float[Tensor, " sums"]:
    """Sums over kept tokens: of the weighted total of all terms, which alone has a gradient, and of each for itself.

    Args:
        student: logits that receive the gradient.
        keep: True for the tokens that count.
        terms: losses and their weights in the total.
        weights: of the tokens; 1 if not given.

    Returns:
        [1 + terms]: the total first.
    """
    return _SumOverLogits.apply(student, keep.to(student.device), tuple(terms), weights)


def chunks(keep: Bool[Tensor, " tokens"], vocabulary: int) -> Iterator[Int[Tensor, " rows"]]:
    """Numbers of the kept tokens, as many at a time as make a temporary of moderate size."""
    yield from keep.nonzero().squeeze(1).split(max(1, _CHUNK_ELEMENTS // vocabulary))


def chunk_sums(
    terms: Sequence[Term], s: Float[Tensor, "rows vocab"], tokens: Int[Tensor, " rows"], weights: Tensor | None
) -> tuple[Float[Tensor, " sums"], Float[Tensor, "rows vocab"] | None]:
    """What one chunk adds to the sums of `sum_over_logits`, and the total's gradient; None if no term has a weight."""
    sums, gradient = [s.new_zeros(())], None
    scale = None if weights is None else weights.to(s.device)[tokens].to(s.dtype)
    for weight, row_loss in terms:
        loss, slope = row_loss(s, tokens)
        sums.append(loss.sum() if scale is None else loss @ scale)
        if weight != 0:
            sums[0] = sums[0] + weight * sums[-1]
            slope = slope if weight == 1 else slope.mul_(weight)
            gradient = slope if gradient is None else gradient.add_(slope)
    if gradient is not None and scale is not None:
        gradient.mul_(scale.unsqueeze(1))
    return torch.stack(sums), gradient


def _cached_rows(s: Float[Tensor, "rows vocab"]) -> list[slice]:
    """Slices of rows: on a processor so few that the temporaries of a kernel stay in its cache, on a GPU all."""
    step = max(1, _CACHED_ELEMENTS // s.shape[1]) if s.device.type == "cpu" else len(s)
    return [slice(first, first + step) for first in range(0, len(s), max(1, step))]


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


class _SumOverLogits(torch.autograd.Function):
    """`sum_over_logits`, a chunk of kept tokens at a time."""

    @staticmethod
    def forward(ctx, logits: Tensor, keep: Tensor, terms: tuple[Term, ...], weights: Tensor | None) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        sums = logits.new_zeros(1 + len(terms), dtype=dtype)
        gradient = torch.zeros_like(logits) if ctx.needs_input_grad[0] else None
        for tokens in chunks(keep, logits.shape[-1]):
            of_chunk, slope = chunk_sums(terms, logits[tokens].to(dtype), tokens, weights)
            sums += of_chunk
            if gradient is not None and slope is not None:
                gradient[tokens] = slope.to(gradient.dtype)
        ctx.gradient = gradient
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        # scaled out of place: a second backward through a retained graph must find the gradient unscaled
        return ctx.gradient * upstream[0][0], None, None, None
