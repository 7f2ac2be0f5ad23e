"""Slow, obvious versions of what looking at a model measures."""

from __future__ import annotations

import copy

import torch


def inputs_of(model, layer: str, sequences: list[torch.Tensor]) -> torch.Tensor:
    """What a layer is handed for sequences that are run one by one, [tokens, cols]."""
    seen = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for sequence in sequences:
            model(input_ids=sequence[None])
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).double()


def idle_share(h: torch.Tensor, threshold: float | None) -> list[float]:
    """Each neuron's share of tokens at zero (threshold None) or below a threshold."""
    shares = []
    for j in range(h.shape[1]):
        idle = [abs(float(x)) < threshold if threshold is not None else float(x) == 0 for x in h[:, j]]
        shares.append(sum(idle) / len(idle))
    return shares


def loss_when_pruned(model, names: list[str], sparsity: float, ids: torch.Tensor) -> float:
    """Mean nats a token of a copy of the model without those layers' smallest weights."""
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            weight = pruned.get_submodule(name).weight
            smallest = weight.abs().flatten().argsort(stable=True)[: round(sparsity * weight.numel())]
            weight.view(-1)[smallest] = 0
        log_p = pruned(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    return -float(log_p.gather(-1, ids[:, 1:, None]).mean())
