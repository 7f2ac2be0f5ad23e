"""Perplexity, bytes and seconds of compressed models, one line a trial, the uncompressed model first.

    python scripts/bench_quality.py                        # all trials on SmolLM2-135M-Instruct, body layers only
    python scripts/bench_quality.py --only 'gptq*' --only 'rtn-4'
    python scripts/bench_quality.py --try 'mine=quantize.gptq {"bits": 3}; quantize.scales {"steps": 20}'
    python scripts/bench_quality.py --calibration train.txt --held-out valid.txt --windows 24 --length 1024
    python scripts/bench_quality.py --dither               # on a copy whose weights lie on no grid

Calibration and training see 32 windows of 512 tokens; what is reported on is seen by nothing else. Bits are those of
the compressed layers' stored tensors, MB of the whole safetensors file. Seconds are those of the stages alone, by the
clock and of all processor cores together; peak memory is the process's so far: run one trial at a time for a clean one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from demo_model import SMOLLM2, default_cache, fetch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_slim
from hf_slim.core.apply import peak_memory
from hf_slim.core.data import DataSource, load_tokens
from hf_slim.core.files import write_text
from hf_slim.core.select import find_layers
from hf_slim.evaluation.perplexity import perplexity

Stages = list[tuple[str, dict[str, Any]]]

G = {"group_size": 64}
FED = {"scope": "row", "importance": "fisher", "feedback": True}
LNQ = {"bits": 2, "scope": "row", "outliers": 0.005}
TRIALS: dict[str, Stages] = {
    "rtn-8": [("quantize.rtn", {"bits": 8, "group_size": None, "symmetric": True})],
    "w8a8": [("quantize.smoothquant", {})],
    "rtn-4": [("quantize.rtn", {"bits": 4, **G})],
    "hqq-4": [("quantize.hqq", {"bits": 4, **G})],
    "gptq-4": [("quantize.gptq", {"bits": 4, **G})],
    "awq-4": [("quantize.awq", {"bits": 4, **G})],
    "autoround-4": [("quantize.autoround", {"bits": 4, **G})],
    "blockwise-4": [("quantize.blockwise", {"bits": 4, **G})],
    "rtn-3": [("quantize.rtn", {"bits": 3, **G})],
    "gptq-3": [("quantize.gptq", {"bits": 3, **G})],
    "blockwise-3": [("quantize.blockwise", {"bits": 3, **G})],
    "gptq-2": [("quantize.gptq", {"bits": 2, **G})],
    "blockwise-2": [("quantize.blockwise", {"bits": 2, **G})],
    "kmeans-4": [("share.kmeans", {"bits": 4, "centroids": "int8", **FED})],
    "kmeans-3": [("share.kmeans", {"bits": 3, **FED})],
    "lnq-3": [("share.lnq", {"bits": 3})],
    "lnq-2": [("share.lnq", LNQ)],
    "lnq-2-guided": [("share.lnq", {"guided": 4, **LNQ})],
    "vq-2": [("share.vq", {})],
    "low-rank-80": [("share.low_rank", {})],
    "low-rank-80-alike": [("share.low_rank", {"ratio": 0.8})],
    "svd-80": [("share.low_rank", {"ratio": 0.8, "basis": "weight"})],
    "wanda-50": [("prune.wanda", {})],
    "sparsegpt-50": [("prune.sparsegpt", {})],
    "alps-50": [("prune.alps", {})],
    "sparsegpt-2:4": [("prune.sparsegpt", {"pattern": "2:4"})],
    "alps-2:4": [("prune.alps", {"pattern": "2:4"})],
    "sparsegpt-70": [("prune.sparsegpt", {"sparsity": 0.7})],
    "alps-70": [("prune.alps", {"sparsity": 0.7})],
}


@dataclass(frozen=True)
class Line:
    """What one trial gave."""

    trial: str
    perplexity: float
    standard_error: float | None
    bits: float
    megabytes: float
    seconds: float
    processor_seconds: float
    peak_gib: float
    notes: list[str]


def load(folder: str, dither: bool) -> PreTrainedModel:
    """The dense model; with `dither`, weights of its blocks move by up to half a 4-bit step of their group of 32."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    if dither:
        noise = torch.Generator().manual_seed(0)
        for layer in find_layers(model).values():
            if layer.block is not None:
                W = model.get_submodule(layer.name).weight.data
                groups = W.float().view(-1, 32)
                step = (groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True)) / 15
                W.copy_((groups + (torch.rand(groups.shape, generator=noise) - 0.5) * step).view(W.shape))
    return model


def run(name: str, stages: Stages, args: argparse.Namespace, data: dict[str, torch.Tensor]) -> Line:
    """Compress a fresh copy of the model and measure it."""
    model, original = load(args.model, args.dither), None
    seconds, processor, reports = 0.0, 0.0, []
    for address, options in stages:
        if "original" in hf_slim.methods.find_method(address).RULES.needs:
            original = original or load(args.model, args.dither).eval()
        start, busy = time.perf_counter(), time.process_time()
        reports.append(hf_slim.compress(model, address, data=data["calibration"], original=original, **options))
        seconds, processor = seconds + time.perf_counter() - start, processor + time.process_time() - busy
    del original
    hf_slim.cache_decoded(model)
    found = perplexity(model, data["held_out"])
    layers = {row.name: row for report in reports for row in report.layers}.values()
    weights = sum(row.rows * row.cols for row in layers)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    return Line(
        trial=name,
        perplexity=found.perplexity,
        standard_error=found.stderr,
        bits=8 * sum(row.bytes for row in layers) / weights if weights else 16.0,
        megabytes=size / 1e6,
        seconds=seconds,
        processor_seconds=processor,
        peak_gib=peak_memory() / 2**30,
        notes=[note for report in reports for note in report.notes][:5],
    )


def parse_trial(text: str) -> tuple[str, Stages]:
    """NAME=METHOD {json}; METHOD {json} ..."""
    name, _, rest = text.partition("=")
    stages = []
    for part in rest.split(";"):
        address, _, options = part.strip().partition(" ")
        stages.append((address, json.loads(options or "{}")))
    return name, stages


def main(argv: list[str] | None = None) -> int:
    """Run the trials and print a line as each ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a causal language model (default: SmolLM2-135M-Instruct, fetched)")
    parser.add_argument("--calibration", default="builtin", metavar="SOURCE")
    parser.add_argument("--held-out", default="builtin", metavar="SOURCE")
    parser.add_argument("--windows", type=int, default=16, help="held-out windows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a held-out window")
    parser.add_argument("--calibration-length", type=int, default=512, help="tokens of a calibration window")
    parser.add_argument("--only", action="append", metavar="PATTERN", help="trials to run")
    parser.add_argument("--try", dest="trials", action="append", type=parse_trial, metavar="TRIAL", default=[])
    parser.add_argument("--dither", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="write the lines there as well")
    args = parser.parse_args(argv)
    args.model = args.model or str(fetch(default_cache(), SMOLLM2))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    held_out = DataSource(source=args.held_out, samples=args.windows, length=args.length)
    calibration = DataSource(source=args.calibration, length=args.calibration_length)
    data = {
        "calibration": load_tokens(calibration, "calibration", tokenizer).ids,
        "held_out": load_tokens(held_out, "held_out", tokenizer).ids,
    }
    patterns = args.only or ([] if args.trials else ["*"])
    trials = {n: s for n, s in TRIALS.items() if any(fnmatch(n, p) for p in patterns)} | dict(args.trials)
    lines = []
    print(
        f"{'trial':<24}{'perplexity':>12}{'+-':>7}{'bits':>8}{'MB':>8}{'seconds':>9}{'of cores':>9}{'peak GiB':>10}",
        flush=True,
    )
    for name, stages in {"original": [], **trials}.items():
        line = run(name, stages, args, data)
        lines.append(line)
        error = f"{line.standard_error:7.2f}" if line.standard_error is not None else f"{'':7}"
        print(
            f"{name:<24}{line.perplexity:12.3f}{error}{line.bits:8.3f}{line.megabytes:8.1f}"
            f"{line.seconds:9.1f}{line.processor_seconds:9.1f}{line.peak_gib:10.2f}"
            + "".join(f"\n    {note}" for note in line.notes),
            flush=True,
        )
        if args.json:
            write_text(Path(args.json), json.dumps([asdict(one) for one in lines], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
