"""What tests of trainers share: ragged data, quiet arguments, and a look at the gradients of each step."""

from __future__ import annotations

import tiny
import torch
from transformers import TrainerCallback, TrainingArguments

torch.set_num_threads(1)  # matrices are tiny, and threads that wait for a busy core take many times as long
LENGTHS = (12, 5, 9, 3, 16, 7, 4, 11)
QUIET = {
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "train_sampling_strategy": "sequential",
    "remove_unused_columns": False,
    "max_grad_norm": 0.0,
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
}


def rows(kind: str = "causal", samples: int = 8, labelled: bool = True) -> list[dict[str, torch.Tensor]]:
    """Samples of ragged length; some labels are -100, as prompts are. `kind` is causal, masked or sequence."""
    made = []
    for i in range(samples):
        ids = tiny.ids(1, LENGTHS[i % len(LENGTHS)], seed=100 + i)[0]
        labels = torch.tensor(i % 2) if kind == "sequence" else ids.clone()
        if kind == "causal":
            labels[: i % 3] = -100
        if kind == "masked":
            labels[torch.arange(len(ids)) % 3 != 0] = -100
        made.append({"input_ids": ids} | ({"labels": labels} if labelled else {}))
    return made


class Pad:
    """Collator that pads to the longest sample, or by `extra` more, on either side."""

    def __init__(self, extra: int = 0, side: str = "right"):
        self.extra, self.side = extra, side

    def __call__(self, samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        length = max(len(sample["input_ids"]) for sample in samples) + self.extra
        batch = {
            "input_ids": torch.stack([self._pad(s["input_ids"], length, 1) for s in samples]),
            "attention_mask": torch.stack([self._pad(torch.ones_like(s["input_ids"]), length, 0) for s in samples]),
        }
        if "labels" in samples[0]:
            batch["labels"] = torch.stack(
                [s["labels"] if s["labels"].dim() == 0 else self._pad(s["labels"], length, -100) for s in samples]
            )
        return batch

    def _pad(self, values: torch.Tensor, length: int, value: int) -> torch.Tensor:
        missing = length - len(values)
        return torch.nn.functional.pad(values, (missing, 0) if self.side == "left" else (0, missing), value=value)


class Gradients(TrainerCallback):
    """Notes every step's gradient as one long vector, as the optimizer is about to use it."""

    def __init__(self):
        self.steps: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs):
        self.steps.append(torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None]))


def arguments(folder, cls=TrainingArguments, **options):
    """Training arguments without progress bars, reports, clipping, shuffling or checkpoints."""
    return cls(output_dir=str(folder), **{**QUIET, **options})


def weights(model: torch.nn.Module) -> torch.Tensor:
    """All parameters as one long vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|."""
    return ((a - b).norm() / b.norm()).item()
