"""Every method on every architecture: what each cell of the README's table runs, and what it expects.

A new method needs an entry in `METHODS`: its options for models of a few thousand weights, which stage must come
before it, and on which architectures it refuses to work, with words from the message that says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import architectures
import gguf_models
import tiny
import torch
from transformers import PreTrainedModel

import hf_slim
from hf_slim.core.forward import run_on
from hf_slim.core.report import StageReport
from hf_slim.core.size import stored_bytes
from hf_slim.integration.bitsandbytes import keep_layout
from hf_slim.methods import changes_model, find_method

IDS = tiny.ids(2, 12)
DECODERS = tuple(name for name, (cls, _) in architectures.KINDS.items() if "CausalLM" in cls or "LMHead" in cls)
ENCODERS = ("BERT", "RoBERTa", "DistilBERT")
OTHERS = (*ENCODERS, "T5")


@dataclass(frozen=True)
class Refusal:
    """Architectures that a method cannot work on.

    Args:
        says: words of the error's message.
        why: the README's footnote.
    """

    names: tuple[str, ...]
    says: str
    why: str


@dataclass(frozen=True)
class Method:
    """How a method is tried.

    Args:
        options: the method's options.
        by_name: options for one architecture besides those.
        after: a stage that comes first, (address, options).
        smaller: the stored bytes shrink.
        refusals: where it does not work.
    """

    options: dict[str, Any] = field(default_factory=dict)
    by_name: dict[str, dict[str, Any]] = field(default_factory=dict, kw_only=True)
    after: tuple[str, dict[str, Any]] | None = None
    smaller: bool = True
    refusals: tuple[Refusal, ...] = ()


GRID = {"bits": 4, "group_size": 16}
TABLE = {"embeddings": {"bits": 8}}
TRAINING = {"steps": 2, "batch_size": 2}
TUNED = GRID | {"iterations": 2}
SHORT = {"tokens_per_column": 0, "iterations": 2}  # 24 tokens are fewer than the columns
CODED = ("quantize.rtn", {"bits": 8, "group_size": None, "symmetric": True, "clip": "minmax"})
NO_LOSS = Refusal(ENCODERS, "has none on plain text", "has no loss on plain text; works under `distill.logits`")
FUSED = Refusal(("Mixtral", "Qwen3-MoE"), "leaves fused experts alone", "bitsandbytes knows no fused experts")
SUBCLASS = Refusal(("Falcon",), "replaces nn.Linear itself only", "bitsandbytes knows no subclass of `nn.Linear`")
GGUF = {"Llama": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3", "Mistral": "mistral"}
GGUF |= {"Gemma 2": "gemma2", "Gemma 3": "gemma3"}
NO_GGUF = Refusal(
    tuple(name for name in architectures.KINDS if name not in GGUF),
    "GGUF export does not know the architecture",
    "not one of the GGUF families that are written",
)
TURNED = Refusal(("GPT-2",), "the format's readers take nn.Linear only", "readers of the format know no `Conv1D`")
EXPERTS = Refusal(("Mixtral", "Qwen3-MoE"), "fused experts", "every reader has its own form of experts")
NOT_CAUSAL = Refusal(OTHERS, "causal language model", "predicts the next token only")
NO_CLASSES = Refusal(tuple(architectures.KINDS), "needs a sequence classifier", "measures sequence classifiers")
SHARED_BIAS = Refusal(("T5",), "a position bias that all blocks share", "all blocks share one position bias a head")
FOLLOWS = Refusal(
    ("OPT", "GPT-2", "GPT-NeoX", "Falcon", *ENCODERS),
    "the width of its attention follows the hidden size",
    "attention is as wide as the hidden size: use `prune.heads` and `prune.apoz`",
)

METHODS: dict[str, Method] = {
    "distill.logits": Method(TRAINING, smaller=False),
    "prune.magnitude": Method({"sparsity": 0.5}),
    "prune.wanda": Method({"sparsity": 0.5}),
    "prune.sparsegpt": Method({"sparsity": 0.5} | SHORT),
    "prune.alps": Method({"sparsity": 0.5} | SHORT),
    "prune.gradual": Method({"sparsity": 0.5, "training": TRAINING}, refusals=(NO_LOSS,)),
    "prune.apoz": Method({"share": 0.25}),
    "prune.heads": Method({"share": 0.5}, refusals=(SHARED_BIAS,)),
    "prune.depth": Method({"blocks": 1}, by_name={"T5": {"stack": "decoder.block"}}),
    "prune.width": Method({"share": 0.25}, refusals=(FOLLOWS,)),
    "prune.vocabulary": Method(),
    "prune.structurize": Method(after=("prune.magnitude", {"sparsity": 0.5}), smaller=False),
    "share.kmeans": Method({"bits": 3, "scope": "tensor"} | TABLE),
    "share.deep_kmeans": Method({"bits": 3, "scope": "tensor", "training": TRAINING}, refusals=(NO_LOSS,)),
    "share.recluster": Method(
        {"training": TRAINING},
        after=("share.kmeans", {"bits": 3, "scope": "tensor"}),
        smaller=False,
        refusals=(NO_LOSS,),
    ),
    "share.lnq": Method({"bits": 3, "scope": "tensor", "rounds": 1, "cycles": 1} | TABLE),
    "share.vq": Method({"bits": 5, "dim": 2, "iterations": 3, "rounds": 1, "cycles": 1} | TABLE),
    "share.hashed": Method({"compression": 4, "block": 8, "embeddings": {"exact": 16, "by": "id"}}),
    "share.low_rank": Method({"ratio": 0.6, "embeddings": {"ratio": 0.5}}),
    "share.tie": Method({"blocks": 1}, by_name={"T5": {"stack": "decoder.block"}}),
    "share.basis": Method({"ratio": 0.6}),
    "quantize.rtn": Method(GRID | TABLE),
    "quantize.hqq": Method(GRID | TABLE | {"iterations": 3}),
    "quantize.bnb": Method(refusals=(FUSED, SUBCLASS)),
    "quantize.gptq": Method(GRID | TABLE),
    "quantize.autoround": Method(TUNED),
    "quantize.blockwise": Method(TUNED),
    "quantize.awq": Method(GRID | {"points": 2}),
    "quantize.smoothquant": Method(),
    "quantize.qat": Method(GRID | {"training": TRAINING}, refusals=(NO_LOSS,)),
    "quantize.scales": Method({**TRAINING, "validation": 1}, after=("quantize.rtn", GRID), smaller=False),
    "evaluate.perplexity": Method(refusals=(NOT_CAUSAL,)),
    "evaluate.accuracy": Method(refusals=(NO_CLASSES,)),
    "evaluate.agreement": Method(),
    "evaluate.latency": Method({"prompt_length": 8, "new_tokens": 2, "repeats": 1}),
    "export.compressed_tensors": Method(after=CODED, refusals=(TURNED, EXPERTS)),
    "export.gguf": Method(after=CODED, refusals=(NO_GGUF,)),
}


def refusal(method: str, architecture: str) -> Refusal | None:
    """Why a method does not work on an architecture, or None."""
    return next((r for r in METHODS[method].refusals if architecture in r.names), None)


def run(method: str, architecture: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Run one cell, with a model of this dtype; AssertionError or whatever went wrong when it does not hold.

    Raises:
        SlimError: the method refuses.
    """
    how = METHODS[method]
    model, tokenizer = _model(method, architecture, dtype)
    before = stored_bytes(model)
    if how.after is not None:
        hf_slim.compress(model, how.after[0], **how.after[1])
        before = stored_bytes(model)
    report = _apply(model, tokenizer, method, architecture, folder)
    if changes_model(method):
        assert report.layers or not how.smaller
        assert stored_bytes(model) < before or not how.smaller
        _same_when_loaded(model, folder / "model")
    elif method.startswith("export."):
        assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) > 0
    else:
        numbers = _numbers(report.metrics)
        assert numbers
        assert all(map(math.isfinite, numbers))


def _model(method: str, architecture: str, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """The model of a cell and its tokenizer: GGUF files hold both, of a few kinds."""
    family = GGUF.get(architecture)
    if method != "export.gguf" or family is None:
        return architectures.make(architecture, dtype=dtype), tiny.tokenizer()
    return gguf_models.model(family), gguf_models.tokenizer(gguf_models.TOKENIZERS[family])


def _apply(model: PreTrainedModel, tokenizer: Any, method: str, architecture: str, folder: Path) -> StageReport:
    needs = find_method(method).RULES.needs
    options = METHODS[method].options | METHODS[method].by_name.get(architecture, {})
    if method.startswith("export."):
        options["to"] = str(folder / "exported")
    return hf_slim.compress(
        model,
        method,
        data=IDS if set(needs) - {"original"} else None,
        original=architectures.make(architecture, dtype=model.dtype) if "original" in needs else None,
        tokenizer=tokenizer,
        **options,
    )


def _numbers(metrics: Any) -> list[float]:
    """Every number in nested metrics."""
    if isinstance(metrics, dict):
        return [number for value in metrics.values() for number in _numbers(value)]
    return [metrics] if isinstance(metrics, int | float) else []


def _same_when_loaded(model: PreTrainedModel, folder: Path) -> None:
    """What is saved loads with nothing missing and nothing left over, and computes the very same."""
    model.save_pretrained(folder)
    how = {"attn_implementation": "eager"}  # as it was made: another one adds up in another order
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True, **how)
    keep_layout(loaded)
    assert {name: found for name, found in info.items() if found} == {}
    assert stored_bytes(loaded) == stored_bytes(model)
    assert torch.equal(logits(loaded), logits(model))


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """The model's logits for a few tokens."""
    return run_on(model.eval(), IDS % model.config.vocab_size).logits  # fewer than there were, where tokens are gone


def table() -> str:
    """The README's table, with a footnote for every refusal."""
    notes: list[str] = []
    rows = []
    for method in METHODS:
        marks = []
        for name in architectures.KINDS:
            found = refusal(method, name)
            if found is not None and found.why not in notes:
                notes.append(found.why)
            marks.append("x" if found is None else f"- {notes.index(found.why) + 1}")
        rows.append(f"| `{method}` | {' | '.join(marks)} |")
    head = [f"| | {' | '.join(architectures.KINDS)} |", f"|---|{':-:|' * len(architectures.KINDS)}"]
    return "\n".join([*head, *rows, "", *(f"{i}. {why}" for i, why in enumerate(notes, 1))])
