"""A tiny T5 that goes on with stories, cut to half of its decoder: taught by the whole one against labels alone.

python scripts/bench_encoder_decoder.py --tokenizer stories260K --train train.txt --held-out valid.txt

The T5 is made and trained here, on windows cut in two: the encoder reads the first half, the decoder writes the second.
Students see the same pairs in the same order; what is reported is the cross entropy with held-out second halves.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, T5Config, T5ForConditionalGeneration

import hf_slim
from hf_slim.core.data import tokens_from

LENGTH = 64


def untrained(words: int) -> PreTrainedModel:
    """A T5 of four blocks on either side."""
    torch.manual_seed(0)
    sizes = {"d_model": 96, "d_kv": 16, "d_ff": 256, "num_heads": 6, "num_layers": 4, "num_decoder_layers": 4}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=words, dropout_rate=0.0, **sizes, **tokens))


def pairs(windows: Tensor) -> list[dict[str, Tensor]]:
    half = LENGTH // 2
    return [{"input_ids": window[:half], "labels": window[half:]} for window in windows]


def train(
    model: PreTrainedModel, teacher: PreTrainedModel | None, windows: Tensor, steps: int, seed: int, alpha: float
) -> None:
    """Train in place; labels alone without a teacher."""
    with tempfile.TemporaryDirectory() as folder:
        args = hf_slim.DistillationConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            warmup_steps=20,
            alpha=alpha,
            seed=seed,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
        )
        hf_slim.DistillationTrainer(model, teacher, args, train_dataset=pairs(windows)).train()


@torch.no_grad()
def cross_entropy(model: PreTrainedModel, windows: Tensor) -> float:
    half = LENGTH // 2
    model.eval()
    losses = [model(input_ids=b[:, :half], labels=b[:, half:].contiguous()).loss for b in windows.split(32)]
    return float(torch.stack(losses).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--teacher-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--alpha", type=float, default=0.5, help="as in recipes/distill_t5.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    windows, held_out = (
        tokens_from([path.read_text(encoding="utf-8")], tokenizer, LENGTH, count, 0).ids
        for path, count in ((arguments.train, 8192), (arguments.held_out, 256))
    )
    teacher = untrained(len(tokenizer))
    train(teacher, None, windows, arguments.teacher_steps, 0, 0.0)
    print("teacher", round(cross_entropy(teacher, held_out), 4), flush=True)
    cut = hf_slim.make_student(teacher, encoder_layers=4, decoder_layers=2)
    print("cut", round(cross_entropy(cut, held_out), 4), flush=True)
    for name, alpha in (("labels", 0.0), ("taught", arguments.alpha)):
        found = []
        for seed in arguments.seeds:
            student = copy.deepcopy(cut)
            train(student, teacher if alpha else None, windows, arguments.steps, seed, alpha)
            found.append(round(cross_entropy(student, held_out), 4))
        print(
            json.dumps({"way": name, "steps": arguments.steps, "each": found, "mean": round(mean(found), 4)}),
            flush=True,
        )


if __name__ == "__main__":
    main()
