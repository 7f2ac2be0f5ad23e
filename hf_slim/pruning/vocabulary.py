"""Vocabulary trimming: tokens that the user's data never uses go (Ushio et al. 2023, arXiv:2305.15020).

    E'[new(i)] = E[i],  H'[new(i)] = H[i]  for the tokens i that stay, new(i) the rank of i among them

E [tokens, width] the embedding, H the head (often the same). The tokenizer is rewritten with the model, in place, so
that it cuts the counted text into the very same tokens under their new numbers; the logits of the tokens that stay are
those of the original, bit for bit up to the order of sums. That needs more than the used tokens:

- BPE reaches a token through merges, so the intermediate tokens of every used one stay too;
- Unigram scores unknown characters by the lowest score there is, so the token that has it stays;
- special and added tokens, the 256 bytes of a byte-level or byte-fallback tokenizer, and without those every single
  character stay: all text can still be written;
- ids that the configs name stay.

Where we differ from the paper: it takes the union of frequent tokens and leaves the tokenizer's rules to the reader.
Whether the segmentation is the same is tried on the text before anything is changed. Text that was not counted is
written with other, shorter tokens; perplexities a token before and after are therefore not comparable there.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from hf_slim.core.context import Context
from hf_slim.core.errors import PlanError
from hf_slim.core.method import MethodConfig, Rules
from hf_slim.core.report import StageReport
from hf_slim.core.select import Layer
from hf_slim.core.vocabulary import reserved_ids, trim_tokens
from hf_slim.core.wordpieces import Pieces, read_pieces

RULES = Rules(needs=("calibration",), preserves=("zeros", "codes", "tied"), paper="Ushio et al. 2023, arXiv:2305.15020")


class Config(MethodConfig):
    """Options of `prune.vocabulary`."""

    min_count: int = Field(1, ge=1, description="times that a token must occur to stay")
    keep: tuple[str, ...] = Field((), description="tokens that stay whether they occur or not")
    drop: tuple[str, ...] = Field((), description="tokens that go whether they occur or not")
    multiple_of: int = Field(1, ge=1, description="round the number of tokens up to a multiple of this")


def plan(layers: dict[str, Layer], config: Config, model: PreTrainedModel) -> dict[str, Layer]:
    """Nothing is known before the text is counted, but embeddings must still be dense.

    Raises:
        PlanError: the embedding or the head is stored as codes.
    """
    found = [
        f"{layer.name} is stored as {layer.encoding.describe()}, whose rows cannot be taken out; put prune.vocabulary "
        "before the stage that encodes it"
        for layer in layers.values()
        if layer.kind in ("embedding", "head") and layer.encoding is not None
    ]
    if found:
        raise PlanError(found)
    return {}


def notes(layers: dict[str, Layer], config: Config, model: PreTrainedModel) -> list[str]:
    """What the plan cannot foresee."""
    return ["how many tokens go is known once the text has been counted; sizes are predicted with all of them"]


def count_tokens(ids: Int[Tensor, "windows length"], size: int) -> Int[Tensor, " size"]:
    """How often each of `size` tokens occurs."""
    return torch.bincount(ids.flatten().cpu(), minlength=size)


def choose(pieces: Pieces, used: set[int], reserved: set[int], config: Config) -> list[int]:
    """The ids that stay, ascending.

    Args:
        used: ids that occur often enough.
        reserved: ids that the model's configs name.

    Raises:
        PlanError: tokens to keep or to drop that do not exist, or that cannot go.
    """
    fixed = pieces.fixed() | reserved
    named = {word: pieces.ids.get(word) for word in (*config.keep, *config.drop)}
    problems = [
        f"prune.vocabulary: the tokenizer has no token {word!r}; write it as the tokenizer stores it"
        for word, number in named.items()
        if number is None
    ]
    drop = {named[word] for word in config.drop} - {None}
    wanted = (used | {named[word] for word in config.keep} - {None}) - drop
    problems += [
        f"prune.vocabulary: drop: {word!r} is {pieces.why_fixed(number)} and cannot go; leave it out of drop"
        for word, number in named.items()
        if number in drop & fixed
    ]
    stays = pieces.closed({number for number in wanted if number is not None} | fixed)
    problems += [
        f"prune.vocabulary: drop: {word!r} is a step on the way to tokens that stay and cannot go; leave it out of drop"
        for word, number in named.items()
        if number in (drop & stays) - fixed
    ]
    if problems:
        raise PlanError(problems)
    for number in pieces.by_rank():
        if len(stays) % config.multiple_of == 0:
            break
        if number not in stays and number not in drop:
            stays = pieces.closed(stays | {number})
    return sorted(stays)


def apply(model: PreTrainedModel, config: Config, context: Context) -> StageReport:
    """Count the text's tokens, rewrite the tokenizer, and cut model and configs to the tokens that stay."""
    plan({}, config, model)
    if context.tokenizer is None:
        raise PlanError("prune.vocabulary rewrites the tokenizer; pass tokenizer=...")
    pieces = read_pieces(context.tokenizer)
    size = model.get_input_embeddings().weight.shape[0]  # pyright: ignore
    ids = context.tokens("calibration")
    texts = context.tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
    again = context.tokenizer(texts, add_special_tokens=False)["input_ids"]  # cut words at the windows' ends
    counts = count_tokens(ids, size) + count_tokens(torch.tensor([[number for row in again for number in row]]), size)
    used = set((counts >= config.min_count).nonzero().flatten().tolist()) & set(pieces.ids.values())
    kept = choose(pieces, used, reserved_ids(model, size) & set(pieces.ids.values()), config)
    tokenizer = pieces.rewritten(kept)
    if config.min_count == 1 and not config.drop:
        pieces.check(tokenizer, kept, texts, again)
    rows = trim_tokens(model, kept)
    context.renumber_tokens(tokenizer, kept)
    notes = [f"{len(kept)} of {size} tokens stay; perplexity a token is not comparable with that of the original"]
    return StageReport(layers=rows, metrics={"tokens_before": size, "tokens": len(kept)}, notes=notes)
