"""A hashed model against a dense one of the same size, both distilled from the model that they were made of.

python scripts/bench_hashing.py --model stories260K --train train.txt --held-out valid.txt

The dense rival is cut out of the same model: its blocks have fewer heads and fewer neurons, those of the largest norm,
until they hold as many weights as the hashed blocks store. Embedding, head and norms are the same in both; both see the
same windows in the same order.
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

SLICED = {"q_proj": ("heads", 0), "k_proj": ("groups", 0), "v_proj": ("groups", 0), "o_proj": ("heads", 1)}
SLICED |= {"gate_proj": ("neurons", 0), "up_proj": ("neurons", 0), "down_proj": ("neurons", 1)}


def body_weights(model: PreTrainedModel) -> int:
    """Stored weights of the blocks' linear layers."""
    wanted = (".self_attn.", ".mlp.")
    return sum(p.numel() for name, p in model.named_parameters() if any(part in name for part in wanted))


def cut(model: Any, compression: float) -> PreTrainedModel:
    """A Llama with at most as many weights in its blocks as hashing at that compression stores."""
    config = copy.deepcopy(model.config)
    layers, width, size = config.num_hidden_layers, config.hidden_size, config.head_dim
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
    for number in range(layers):
        _fill(model, taken, f"model.layers.{number}", groups * each, groups, neurons)
    for name, tensor in model.state_dict().items():
        if tensor.shape == taken[name].shape:
            taken[name] = tensor
    small.load_state_dict(taken)
    return small.eval()


def _fill(model: Any, taken: dict[str, Tensor], block: str, heads: int, groups: int, neurons: int) -> None:
    full, size = model.state_dict(), model.config.head_dim
    mlp = [full[f"{block}.mlp.{name}.weight"] for name in ("gate_proj", "up_proj", "down_proj")]
    best = (mlp[0].norm(dim=1) * mlp[1].norm(dim=1) * mlp[2].norm(dim=0)).argsort(descending=True)
    index = {"neurons": best[:neurons], "heads": torch.arange(heads * size), "groups": torch.arange(groups * size)}
    for name, (which, axis) in SLICED.items():
        key = f"{block}.{'mlp' if which == 'neurons' else 'self_attn'}.{name}.weight"
        taken[key] = full[key].index_select(axis, index[which])


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
    parser.add_argument("--ways", nargs="+", default=["{}", '{"restore_norm": true}', '{"block": 1}', "cut"])
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
                student = cut(teacher, compression) if way == "cut" else copy.deepcopy(teacher)
                if way != "cut":
                    hf_slim.compress(student, "share.hashed", compression=compression, **json.loads(way))
                before = perplexity(student, held_out).perplexity
                options = {"steps": arguments.steps, "batch_size": 8, "learning_rate": rate}
                trained(student, teacher, train, options)
                row = {"compression": compression, "way": way, "rate": rate, "weights": body_weights(student)}
                row |= {"untrained": round(before, 2), "trained": round(perplexity(student, held_out).perplexity, 3)}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
