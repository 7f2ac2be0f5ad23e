"""Speed and memory of encoded models against bfloat16, on a random model of TinyLlama-1.1B's shape.

python scripts/bench_speed.py                 # 22 layers, 2 threads, a few minutes
python scripts/bench_speed.py --layers 4      # a quick look
python scripts/bench_speed.py --device cuda

Decode (one token after another) and prefill (a prompt at once) at batch 1, models timed in turns, medians. `limit` is
the speed at which the weights of a token could be read at all: streaming bandwidth / bytes a token. Memory is measured
in processes of their own: how far the peak rises above what was resident before. `own` counts what the process
allocated, `resident` also the pages of files that are mapped, which the system takes back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from hf_slim import SlimConfig
from hf_slim.encodings.modules import EncodedModule

CHOICES: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "int8": {"bits": 8, "group_size": None, "symmetric": True},
    "int4 g64": {"bits": 4, "group_size": 64},
}
LAYERS = {"include": ["model.layers.*", "lm_head"]}
BARS = {"int8": 1.7, "int4 g64": 2.5}
PREFILL_BAR = 0.9


def random_model(layers: int, hidden: int = 2048) -> PreTrainedModel:
    """TinyLlama-1.1B's shape (at `hidden` = 2048); every weight is a piece of one pool of normal numbers."""
    heads = hidden // 64
    config = LlamaConfig(
        vocab_size=32000 * hidden // 2048,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 8),
        max_position_embeddings=2048,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    rotary = type(model.model.rotary_emb)(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.model.rotary_emb = rotary
    sizes = [parameter.numel() for parameter in model.parameters()]
    pool = torch.randn(max(sizes), generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.ones(()) if "norm" in name else pool[: parameter.numel()].view_as(parameter))
    return model.eval()


def streaming_bandwidth(device: str, size: int = 1 << 28) -> float:
    """Bytes a second that one pass over a tensor of 4 * `size` bytes reads; the best of five."""
    numbers = torch.ones(size, device=device)
    seconds = [_seconds(numbers.sum, device) for _ in range(6)][1:]
    return numbers.nbytes / min(seconds)


def bytes_a_token(model: nn.Module) -> int:
    """What one decode step reads: every weight but the input embedding's, as it lies in memory by then."""
    embedding = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    total = 0
    for module in model.modules():
        if module is embedding:
            continue
        if isinstance(module, EncodedModule):
            total += module.resident_bytes()
        else:
            total += sum(parameter.nbytes for parameter in module.parameters(recurse=False))
    return total


@torch.inference_mode()
def prefill(model: PreTrainedModel, tokens: int) -> float:
    """Seconds to read a prompt."""
    ids = torch.arange(tokens, device=model.device)[None]
    return _seconds(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1), model.device.type)


@torch.inference_mode()
def decode(model: PreTrainedModel, tokens: int) -> float:
    """Seconds to write that many tokens after a prompt of 16."""
    output = model(input_ids=torch.arange(16, device=model.device)[None], use_cache=True)

    def write() -> None:
        past, logits = output.past_key_values, output.logits
        for _ in range(tokens):
            step = model(input_ids=logits[:, -1:].argmax(-1), past_key_values=past, use_cache=True)
            past, logits = step.past_key_values, step.logits

    return _seconds(write, model.device.type)


def _seconds(work: Any, device: str) -> float:
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def speeds(models: dict[str, PreTrainedModel], arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Tokens a second, medians of runs taken in turns."""
    for model in models.values():
        decode(model, 2)  # warm, and packed
    found = {name: {} for name in models}
    for what, run, tokens, repeats in (
        ("decode", decode, arguments.new_tokens, arguments.repeats),
        ("prefill", prefill, arguments.prompt, arguments.prefill_repeats),
    ):
        runs = [{name: run(model, tokens) for name, model in models.items()} for _ in range(repeats)]
        for name in models:
            found[name][what] = tokens / median(each[name] for each in runs)
    return found


def peak_memory(source: Path, options: dict[str, Any] | None, save_to: Path | None = None) -> dict[str, int]:
    """Load a model in a process of its own; with options, quantize it on the way.

    Returns:
        Bytes: how far the peaks of `own` and `resident` memory rose; `result` is what the model's tensors take, and
        `largest` its largest dense tensor.
    """
    job = json.dumps({"source": str(source), "options": options, "save_to": save_to and str(save_to)})
    done = subprocess.run([sys.executable, __file__, "--worker", job], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _work(job: dict[str, Any]) -> dict[str, int]:
    """What the process of `peak_memory` does. A tiny model goes first, so that code and buffers are there already."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        random_model(1, 64).save_pretrained(folder)
        quantized = SlimConfig("quantize.rtn", **(job["options"] or CHOICES["int8"]), clip="minmax", layers=LAYERS)
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantized)
    config = SlimConfig("quantize.rtn", **job["options"], clip="minmax", layers=LAYERS) if job["options"] else None
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before, watch = _status("VmRSS"), _Watch()
    with watch:
        model = AutoModelForCausalLM.from_pretrained(
            job["source"], dtype=torch.bfloat16, **({"quantization_config": config} if config else {})
        )
        for tensor in [*model.parameters(), *model.buffers()]:  # bring the pages of mapped files in
            tensor.flatten()[::1024].float().sum()
    resident = _status("VmHWM") - before
    tensors: dict[int, Tensor] = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    weights = [m.rows * m.cols * 2 for m in model.modules() if isinstance(m, EncodedModule)]
    if job["save_to"]:
        model.save_pretrained(job["save_to"])
    return {
        "own": watch.peak,
        "resident": resident,
        "result": sum(tensor.nbytes for tensor in tensors.values()),
        "largest": max([*weights, *(parameter.nbytes for parameter in model.parameters())]),
    }


class _Watch(threading.Thread):
    """How far the memory that this process allocated rises, looked at every 2 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before = _status("RssAnon")
        self.peak, self.done = 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.002):
            self.peak = max(self.peak, _status("RssAnon") - self.before)

    def __enter__(self) -> _Watch:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.join()


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, in a folder that is thrown away."""
    torch.set_num_threads(arguments.threads)
    rows: dict[str, dict[str, Any]] = {name: {} for name in CHOICES}
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "bf16"
        random_model(arguments.layers).save_pretrained(dense)
        places = {name: Path(folder) / name.replace(" ", "-") for name in CHOICES}
        for name, options in CHOICES.items():
            if options is not None:
                rows[name]["quantize"] = peak_memory(dense, options, places[name])
            rows[name]["load"] = peak_memory(places[name], None)
        models = {
            name: AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16).to(arguments.device).eval()
            for name, place in places.items()
        }
    bandwidth = streaming_bandwidth(arguments.device)
    for name, found in speeds(models, arguments).items():
        rows[name] |= found | {"bytes_a_token": bytes_a_token(models[name])}
        rows[name]["limit"] = bandwidth / rows[name]["bytes_a_token"]
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {arguments.threads} threads"
    return {"layers": arguments.layers, "device": device, "bandwidth": bandwidth, "models": rows}


def show(found: dict[str, Any]) -> None:
    """The table, the memory, and what is missing."""
    console = Console(width=120, highlight=False)
    base = found["models"]["bf16"]
    table = Table("", "decode tok/s", "x bf16", "bar", "limit tok/s", "prefill tok/s", "x bf16", "MB a token", box=None)
    for name, row in found["models"].items():
        table.add_row(
            name,
            f"{row['decode']:.2f}",
            f"{row['decode'] / base['decode']:.2f}",
            f"{BARS[name]}" if name in BARS else "",
            f"{row['limit']:.1f}",
            f"{row['prefill']:.1f}",
            f"{row['prefill'] / base['prefill']:.2f}",
            f"{row['bytes_a_token'] / 1e6:.0f}",
        )
    console.print(f"{found['layers']} layers, {found['device']}, {found['bandwidth'] / 1e9:.1f} GB/s; prefill bar 0.9")
    console.print(table)
    memory = Table("peak MB above the start", "own", "resident", "result + largest dense tensor", box=None)
    for name, row in found["models"].items():
        for what in ("quantize", "load"):
            if what in row:
                m = row[what]
                sizes = (m["own"], m["resident"], m["result"] + m["largest"])
                memory.add_row(f"{what} {name}", *(f"{size / 1e6:.0f}" for size in sizes))
    console.print(memory)
    if not torch.cuda.is_available():
        console.print("GPU figures are missing: there is no GPU here.")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3, help="of decoding")
    parser.add_argument("--prefill-repeats", type=int, default=1, help="bfloat16 may need a minute for one")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    chosen = _parse()
    if chosen.worker:
        print(json.dumps(_work(json.loads(chosen.worker))))
    else:
        logging.disable_progress_bar()
        result = benchmark(chosen)
        print(json.dumps(result, indent=1)) if chosen.json else show(result)
