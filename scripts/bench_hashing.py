"""A hashed model against a dense one of the same size, both distilled from the model that they were made of.

python scripts/bench_hashing.py --model stories260K --train train.txt --held-out valid.txt

The dense rival is cut out of the same model: its blocks have fewer heads and fewer neurons, those of the largest norm,
until they hold as many weights as the hashed blocks store; with {"blocks": n} there are only n of them, evenly spaced.
Embedding, head and norms are the same in both; both see the same windows in the same order.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

import hf_slim
from hf_slim.core.data import tokens_from
from hf_slim.evaluation.perplexity import perplexity

Weights = dict[str, Tensor]
SLICED = {"q_proj": ("heads", 0), "k_proj": ("groups", 0), "v_proj": ("groups", 0), "o_proj": ("heads", 1)}
SLICED |= {"gate_proj": ("neurons", 0), "up_proj": ("neurons", 0), "down_proj": ("neurons", 1)}


def body_weights(model: PreTrainedModel) -> int:
    """Stored weights of the blocks' linear layers."""
    wanted = (".self_attn.", ".mlp.")
    return sum(p.numel() for name, p in model.named_parameters() if any(part in name for part in wanted))


def cut(model: Any, compression: float, blocks: int | None = None) -> PreTrainedModel:
    """A Llama with at most as many weights in its blocks as hashing at that compression stores."""
    config = copy.deepcopy(model.config)
    spread = torch.linspace(0, config.num_hidden_layers - 1, blocks or config.num_hidden_layers).round().long().tolist()
    config.num_hidden_layers = layers = len(spread)
    width, size = config.hidden_size, config.head_dim
    each = config.num_attention_heads // config.num_key_value_heads
    budget = body_weights(model) / compression / layers
    group = 2 * width * size * (each + 1)  # a head of keys and values, and the queries and outputs that go with it
    groups = min(config.num_key_value_heads, int(budget / 2 // group))
    if groups == 0:  # not even one such group in half of the room
        groups, each = 1, 1
    attention = 2 * width * size * groups * (each + 1)
    neurons = int((budget - attention) // (3 * width))
    if neurons < 1:
        raise SystemExit(f"compression {compression:g} leaves a dense block no neuron")
    config.num_key_value_heads, config.num_attention_heads, config.intermediate_size = groups, groups * each, neurons
    small = LlamaForCausalLM(config)
    taken = small.state_dict()
    full = model.state_dict()
    for number, source in enumerate(spread):
        block, own = f"model.layers.{number}.", f"model.layers.{source}."
        _fill(full, taken, (own, block), size, (groups * each, groups, neurons))
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            taken[block + norm] = full[own + norm]
    taken |= {name: tensor for name, tensor in full.items() if ".layers." not in name}
    small.load_state_dict(taken)
    return small.eval()


def _fill(full: Weights, taken: Weights, blocks: tuple[str, str], size: int, counts: tuple[int, int, int]) -> None:
    """Part of one block's matrices as another's: the first heads, and the neurons of largest norm."""
    heads, groups, neurons = counts
    source, block = blocks
    mlp = [full[f"{source}mlp.{name}.weight"] for name in ("gate_proj", "up_proj", "down_proj")]
    best = (mlp[0].norm(dim=1) * mlp[1].norm(dim=1) * mlp[2].norm(dim=0)).argsort(descending=True)
    index = {"neurons": best[:neurons], "heads": torch.arange(heads * size), "groups": torch.arange(groups * size)}
    for name, (which, axis) in SLICED.items():
        key = f"{'mlp' if which == 'neurons' else 'self_attn'}.{name}.weight"
        taken[block + key] = full[source + key].index_select(axis, index[which])


def trained(student: PreTrainedModel, teacher: PreTrainedModel, train: Tensor, options: dict[str, Any]) -> None:
    hf_slim.compress(student, "distill.logits", data=train, original=teacher, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--compressions", type=float, nargs="+", default=[4, 8, 16])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[2e-3])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of hashes and of the order of windows")
    parser.add_argument("--ways", nargs="+", default=["{}", '{"block": 1}', '{"blocks": 5}'])
    arguments = parser.parse_args()
    teacher = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    train, held_out = (
        tokens_from([path.read_text(encoding="utf-8")], tokenizer, 128, count, 0).ids
        for path, count in ((arguments.train, 8 * arguments.steps), (arguments.held_out, 128))
    )
    print("dense", body_weights(teacher), round(perplexity(teacher, held_out).perplexity, 3), flush=True)
    for compression in arguments.compressions:
        for rate in arguments.learning_rates:
            for way in arguments.ways:
                chosen = json.loads(way)
                student = cut(teacher, compression, **chosen) if "blocks" in chosen else copy.deepcopy(teacher)
                if "blocks" not in chosen:
                    seeded = {"hash_seed": arguments.seed, **chosen}
                    hf_slim.compress(student, "share.hashed", compression=compression, **seeded)
                before = perplexity(student, held_out).perplexity
                options = {"steps": arguments.steps, "batch_size": 8, "learning_rate": rate, "seed": arguments.seed}
                trained(student, teacher, train, options)
                row = {"compression": compression, "way": way, "rate": rate, "weights": body_weights(student)}
                row |= {"untrained": round(before, 2), "trained": round(perplexity(student, held_out).perplexity, 3)}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
