"""On-policy distillation: the student also learns from what it writes itself (GKD, Agarwal et al., arXiv:2306.13649).

A student that is only taught on given text meets, once it generates, beginnings that nobody taught it. Therefore a
share λ of the batches is replaced: what stands before the first label that counts, or else the first half of a row, is
the prompt, the student goes on from there, and its teacher judges every token that it wrote. Words are drawn from the
student's own distribution, not sharpened or cut; no gradient flows through the drawing. There is no label loss on such
batches: the student would learn to repeat itself.

    input_ids   prompt, generated        labels   -100 ..., generated        [batch, prompt + new], padded on the right

Whether a batch is replaced depends on seed, step and its number in the step, the draws on these and on the process:
a run resumed at a checkpoint, or with another number of accumulated batches before it, draws what it would have drawn.
All batches of a step are written before its first loss, by the weights that the step starts from.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import GenerationConfig

from hf_slim.core.forward import device_of
from hf_slim.distillation.losses import IGNORED
from hf_slim.distillation.vocabulary import real_positions

GENERATED = "generated"
"""What marks a batch that the student has written."""

# what is not said here, generation takes from its own defaults, some of which are not neutral
_AS_IT_IS: dict[str, Any] = {
    "do_sample": True,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "return_dict_in_generate": False,
    "num_return_sequences": 1,
}


@dataclass(frozen=True)
class Generation:
    """How often, and how, the student writes its own batches.

    Args:
        share: λ, of the batches, 0 to 1.
        max_new_tokens: that are written at most; nor does a row get longer than the longest given one.
        seed: of the choice of batches and of the words.
    """

    share: float
    max_new_tokens: int
    seed: int

    def is_chosen(self, step: int, number: int) -> bool:
        """Whether a batch is replaced, by its number in the step; the same in all processes."""
        return random.Random(seed_of(self.seed, step, number)).random() < self.share

    def write(
        self,
        model: Any,
        batch: Mapping[str, Any],
        place: tuple[int, ...],
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> dict[str, Any]:
        """A batch with the given one's prompts and the student's words.

        Args:
            model: the student, in any mode; it is left in that mode.
            batch: with "input_ids" and, where there is padding, "attention_mask".
            place: numbers that the draws depend on, beside the seed.
            around: makes a context for the forward passes, such as autocast.
        """
        device, own = device_of(model), model.generation_config
        ids, real = batch["input_ids"].to(device), real_positions(batch).to(device)
        empty = ~real.any(1)
        real[:, 0] |= empty  # something to write on from; nothing of it counts
        prompts, lengths, new = prompts_of(ids, real, batch.get("labels"))
        ends = torch.tensor([] if own.eos_token_id is None else own.eos_token_id, device=device).view(-1).long()
        pad = own.pad_token_id if own.pad_token_id is not None else 0
        chosen = GenerationConfig(
            **_AS_IT_IS,
            max_new_tokens=min(self.max_new_tokens, new),
            pad_token_id=pad,
            eos_token_id=ends.tolist() or None,
        )
        mask = (torch.arange(prompts.shape[1], device=device) >= prompts.shape[1] - lengths.unsqueeze(1)).long()
        with _writing(model, device, seed_of(self.seed, *place)), around():
            written = model.generate(prompts, attention_mask=mask, generation_config=chosen)
        made = judged(written, mask != 0, ends, pad)
        made["labels"][empty] = IGNORED
        return made


def prompts_of(
    ids: Int[Tensor, "batch length"],
    real: Bool[Tensor, "batch length"],
    labels: Int[Tensor, "batch length"] | None = None,
) -> tuple[Int[Tensor, "batch prompt"], Int[Tensor, " batch"], int]:
    """What the student goes on from, padded on the left as generation wants it; the lengths; the longest rest of a row.

    It is what stands before the first label that counts, or else the first half of a row.
    """
    lengths = (real.sum(1) // 2).clamp(min=1)
    if labels is not None:
        counted = real & (labels.to(real.device) != IGNORED)
        before = (real & (counted.cumsum(1) == 0)).sum(1)
        lengths = torch.where((before > 0) & counted.any(1), before, lengths)
    longest = int(lengths.max())
    prompts = ids.new_zeros(len(ids), longest)
    for row, kept, length, prompt in zip(ids, real, lengths.tolist(), prompts, strict=True):
        prompt[longest - length :] = row[kept][:length]
    return prompts, lengths, max(1, int((real.sum(1) - lengths).max()))


def judged(
    written: Int[Tensor, "batch length"], prompt: Bool[Tensor, "batch prompt"], ends: Int[Tensor, " ends"], pad: int
) -> dict[str, Any]:
    """What was generated, as a batch to train on: padded on the right, the prompt and all after an end ignored.

    Args:
        written: prompts, padded on the left, and what follows them.
        prompt: True where a prompt is no padding.
        ends: tokens that end a text; they themselves count.
        pad: the token to pad with.
    """
    start = prompt.shape[1]
    is_end = torch.isin(written[:, start:], ends)
    real = torch.cat([prompt, is_end.cumsum(1) - is_end.long() == 0], dim=1)
    labels = torch.where(real, written, IGNORED)
    labels[:, :start] = IGNORED
    order = (~real).long().argsort(dim=1, stable=True)  # the real ones first, in the order they have
    real = real.gather(1, order)
    return {
        "input_ids": written.gather(1, order).masked_fill(~real, pad),
        "attention_mask": real.long(),
        "labels": labels.gather(1, order),
        GENERATED: True,
    }


@contextmanager
def _writing(model: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    """No gradients, eval mode, plain generation, random numbers of its own; afterwards everything is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    inside: Any = getattr(model, "get_base_model", lambda: model)()
    own, inside.generation_config = inside.generation_config, GenerationConfig()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        model.eval()
        try:
            yield
        finally:
            inside.generation_config = own
            for module, training in modes:
                module.training = training


def seed_of(*numbers: int) -> int:
    """One seed of several numbers; torch looks at its lower 32 bits alone, so that all of them must reach these."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "little")
