"""The experiment of HashedNets (Chen et al. 2015, figure 2) in shape: a wide network with shared weights against a
narrow one with weights of its own, both trained from nothing, equal in what they store.

    python scripts/bench_hashednets.py --model stories260K --train train.txt --held-out valid.txt

The network has one hidden layer, as the paper's. It predicts a token from the `CONTEXT` tokens before it, whose
embeddings are those of a trained model and stay as they are, like pixels. Each way gets the better learning rate of
those tried, chosen on text kept apart from what is reported on.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_slim.core.data import tokens_from
from hf_slim.encodings import Hashed
from hf_slim.encodings.modules import EncodedLinear

CONTEXT = 8
BATCH = 256


def linear(layer: nn.Linear | EncodedLinear, inputs: int) -> nn.Module:
    """The layer with its stored weights drawn anew: shared ones are as large as a layer's own."""
    weights = layer.buckets if isinstance(layer, EncodedLinear) else layer.weight
    nn.init.normal_(weights, std=math.sqrt(2 / inputs))
    nn.init.zeros_(layer.bias)
    return layer


def dense(inputs: int, hidden: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        linear(nn.Linear(inputs, hidden), inputs), nn.ReLU(), linear(nn.Linear(hidden, outputs), hidden)
    )


def hashed(inputs: int, hidden: int, outputs: int, stored: int) -> nn.Module:
    """A network of `hidden` neurons that stores as many numbers, biases counted."""
    share = (stored - hidden - outputs) / (hidden * (inputs + outputs))
    layers = []
    for seed, (i, o) in enumerate(((inputs, hidden), (hidden, outputs))):
        encoding = Hashed(buckets=int(share * i * o), block=1, seed=seed)
        layers.append(linear(EncodedLinear(i, o, encoding, dtype=torch.float32), i))
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


def pairs(path: Path, tokenizer: Any, windows: int) -> tuple[Tensor, Tensor]:
    """Inputs [n, CONTEXT] of ids and the token that follows each."""
    ids = tokens_from([path.read_text(encoding="utf-8")], tokenizer, 128, windows, 0).ids
    runs = ids.unfold(1, CONTEXT + 1, 1).flatten(0, 1)
    return runs[:, :-1], runs[:, -1]


def perplexity(net: nn.Module, data: tuple[Tensor, Tensor], embeddings: Tensor) -> float:
    with torch.no_grad():
        losses = [
            F.cross_entropy(net(embeddings[x].flatten(1)), y, reduction="sum")
            for x, y in zip(data[0].split(4096), data[1].split(4096), strict=True)
        ]
    return math.exp(sum(float(loss) for loss in losses) / len(data[1]))


def train(net: nn.Module, data: tuple[Tensor, Tensor], embeddings: Tensor, steps: int, rate: float, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(data[1]), (BATCH,), generator=draws)
        loss = F.cross_entropy(net(embeddings[data[0][chosen]].flatten(1)), data[1][chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--compressions", type=float, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 4e-3, 1.2e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    embeddings = model.get_input_embeddings().weight.detach()
    embeddings = embeddings / embeddings.std()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    seen = pairs(arguments.train, tokenizer, 2000)
    apart, unseen = _halves(pairs(arguments.held_out, tokenizer, 256))
    inputs, outputs = CONTEXT * embeddings.shape[1], embeddings.shape[0]
    for seed in arguments.seeds:
        for compression in arguments.compressions:
            row: dict[str, object] = {"seed": seed, "compression": compression}
            narrow = max(1, int(arguments.hidden / compression))
            stored = narrow * (inputs + outputs + 1) + outputs
            row["stored"] = stored
            ways = {
                "dense": lambda: dense(inputs, narrow, outputs),  # noqa: B023
                "hashed": lambda: hashed(inputs, arguments.hidden, outputs, stored),  # noqa: B023
            }
            for way, make in ways.items():
                found = []
                for rate in arguments.learning_rates:
                    torch.manual_seed(seed)
                    net = make()
                    train(net, seen, embeddings, arguments.steps, rate, seed)
                    found.append((perplexity(net, apart, embeddings), perplexity(net, unseen, embeddings), rate))
                row[way] = {"perplexity": round(min(found)[1], 2), "rate": min(found)[2]}
            print(json.dumps(row), flush=True)


def _halves(data: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    half = len(data[1]) // 2
    return [(data[0][:half], data[1][:half]), (data[0][half:], data[1][half:])]


if __name__ == "__main__":
    main()
