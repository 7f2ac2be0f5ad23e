"""Memory and time of the distillation loss, and of a training step, against the naive loss and a plain step.

python scripts/bench_distillation.py loss                # 4096 tokens over 49152 words
python scripts/bench_distillation.py loss --dtype bfloat16
python scripts/bench_distillation.py step                # 10 of SmolLM2's layers learn from 30, 2 x 256 tokens
python scripts/bench_distillation.py step --trl          # and the same by TRL's GKDTrainer, where TRL is installed

`loss`: forward KL of a student's hidden states and head against a teacher's, forward and backward. `naive` is what
autograd makes of the definition; `unfused` makes both models' logits and chunks what follows; `fused` makes no logits
of the whole batch. Each runs in a process of its own, in turns; memory is how far the resident peak rises above what
the models' own tensors and their gradients take. `step`: `DistillationTrainer`'s loss and backward pass against a
student's forward and backward pass on labels, and a teacher's forward pass, in turns; TRL's is what its trainer does
with the same batch, by forward KL. Times are medians of processor
time, which other programs on the machine disturb least.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import kl_div, linear, log_softmax
from transformers import LlamaConfig, LlamaForCausalLM

from hf_slim.distillation import fused
from hf_slim.distillation.losses import against_teacher, kl_divergence
from hf_slim.distillation.trainer import DistillationConfig, DistillationTrainer

VARIANTS = ("naive", "unfused", "fused")
TEMPERATURE = 2.0


def naive(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """The definition, left to autograd, in fp32."""
    with torch.no_grad():
        log_p = log_softmax(linear(teacher_hidden, teacher_weight).float() / TEMPERATURE, -1)
    log_q = log_softmax(linear(hidden, weight).float() / TEMPERATURE, -1)
    return kl_div(log_q, log_p, reduction="sum", log_target=True) * TEMPERATURE**2


def unfused(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """Logits of both, then the chunked loss."""
    with torch.no_grad():
        teacher = linear(teacher_hidden, teacher_weight)
    return kl_divergence(linear(hidden, weight), teacher, torch.ones(len(hidden), dtype=torch.bool), TEMPERATURE)


def from_hidden(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """No logits of the whole batch."""
    loss = against_teacher(lambda tokens: linear(teacher_hidden[tokens], teacher_weight), TEMPERATURE)
    keep = torch.ones(len(hidden), dtype=torch.bool)
    return fused.sum_over_hidden(hidden, weight, None, keep, [(1.0, loss)])[0]


LOSSES: dict[str, Callable[..., Tensor]] = {"naive": naive, "unfused": unfused, "fused": from_hidden}


def measure_loss(variant: str, tokens: int, vocabulary: int, width: int, dtype: torch.dtype) -> dict[str, float]:
    """Loss, its gradients' norms, processor seconds and bytes above the tensors themselves; in a fresh process."""
    torch.manual_seed(0)
    shapes = [(tokens, width), (vocabulary, width)] * 2
    hidden, weight, *teacher = (torch.randn(shape).mul_(shape[1] ** -0.25).to(dtype) for shape in shapes)
    for leaf in (hidden, weight):
        leaf.requires_grad_().grad = torch.zeros_like(leaf)
    LOSSES[variant](hidden[:64], weight, teacher[0][:64], teacher[1]).backward()  # libraries load here
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    base, start = _peak_now(), time.process_time()
    loss = LOSSES[variant](hidden, weight, *teacher)
    loss.backward()
    seconds = time.process_time() - start
    norms = [leaf.grad.float().norm().item() for leaf in (hidden, weight)]  # pyright: ignore
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - base
    return {"loss": loss.item(), "hidden": norms[0], "head": norms[1], "seconds": seconds, "bytes": peak}


def _peak_now() -> int:
    """Resident bytes now, from where a peak is counted."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def compare_losses(args: argparse.Namespace) -> list[dict]:
    """Every variant in turns, each in a process of its own."""
    runs: dict[str, list[dict]] = {variant: [] for variant in VARIANTS}
    for _ in range(args.rounds):
        for variant in VARIANTS:
            command = [sys.executable, __file__, "loss", "--variant", variant, "--dtype", args.dtype]
            for name in ("tokens", "vocabulary", "width"):
                command += [f"--{name}", str(getattr(args, name))]
            runs[variant].append(json.loads(subprocess.check_output(command)))
    rows = []
    for variant, measured in runs.items():
        row = {key: median(run[key] for run in measured) for key in measured[0]}
        rows.append({"variant": variant, **row})
        print(f"{variant:8} {row['seconds']:7.2f} s {row['bytes'] / 1e6:8.0f} MB   loss {row['loss']:.8g}")
    return rows


def compare_steps(args: argparse.Namespace) -> list[dict]:
    """A distillation step against its necessary parts."""
    torch.manual_seed(0)
    student, teacher = _model(args.layers, args), _model(args.teacher_layers, args)
    ids = torch.randint(args.vocabulary, (2, args.length))
    with tempfile.TemporaryDirectory() as folder:
        options = DistillationConfig(folder, report_to=[], use_cpu=True, logging_strategy="no", disable_tqdm=True)
        trainer = DistillationTrainer(student, teacher, options)
    student.train()

    def parts() -> None:
        with torch.no_grad():
            teacher(input_ids=ids, use_cache=False)
        student(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    def step() -> None:
        trainer.compute_loss(student, {"input_ids": ids, "labels": ids}).backward()

    runs = {"parts": parts, "step": step} | ({"trl": _trl_step(student, teacher, ids)} if args.trl else {})
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(args.rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if round_:  # the first warms up
                seconds[name].append(time.process_time() - start)
            student.zero_grad()
    rows = [{"variant": name, "seconds": median(times)} for name, times in seconds.items()]
    for row in rows:
        row["ratio"] = row["seconds"] / rows[0]["seconds"]
        print(f"{row['variant']:6} {row['seconds']:7.2f} s   {row['ratio']:.3f}")
    return rows


def _trl_step(student: LlamaForCausalLM, teacher: LlamaForCausalLM, ids: Tensor) -> Callable[[], None]:
    """What TRL's GKDTrainer does with a batch that is not the student's own: its loss alone needs no whole trainer."""
    from trl.experimental.gkd import GKDTrainer  # pyright: ignore[reportMissingImports]

    trainer = SimpleNamespace(teacher_model=teacher, beta=0.0, generalized_jsd_loss=GKDTrainer.generalized_jsd_loss)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

    def step() -> None:
        GKDTrainer.compute_loss(trainer, student, batch).backward()

    return step


def _model(layers: int, args: argparse.Namespace) -> LlamaForCausalLM:
    """SmolLM2-135M's shape, with random weights."""
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("loss", "step"))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--teacher-layers", type=int, default=30)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trl", action="store_true", help="step: time TRL's GKDTrainer too")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.variant:
        sizes = args.tokens, args.vocabulary, args.width
        print(json.dumps(measure_loss(args.variant, *sizes, getattr(torch, args.dtype))))
        return 0
    rows = compare_losses(args) if args.what == "loss" else compare_steps(args)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
