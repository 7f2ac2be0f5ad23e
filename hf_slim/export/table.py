"""The one table of a run: before beside after, as rows of text."""

from __future__ import annotations

from typing import NamedTuple

from hf_slim.core.report import RunReport


class Row(NamedTuple):
    """One line of the table; `before` is empty where there is no such thing."""

    what: str
    before: str
    after: str


def summary(report: RunReport) -> list[Row]:
    """Size, quality and speed, the original beside the result."""
    size = report.size
    rows = [
        Row("size on disk", _megabytes(size.bytes_before), _megabytes(size.file_bytes)),
        Row("bits per weight", f"{size.bits_before:.2f}", f"{size.bits_after:.2f}"),
    ]
    for stage in report.stages:
        rows += _METRICS.get(stage.method, lambda _: [])(stage.metrics)
    return rows


def stage_seconds(report: RunReport) -> list[tuple[str, str]]:
    """Each stage and how long it took."""
    return [(stage.method, f"{stage.seconds:.1f} s") for stage in report.stages]


def _perplexity(metrics: dict) -> list[Row]:
    before, after = metrics["before"], metrics["after"]
    return [Row("perplexity, held-out text", f"{before['perplexity']:.2f}", f"{after['perplexity']:.2f}")]


def _accuracy(metrics: dict) -> list[Row]:
    before, after = metrics["before"], metrics["after"]
    return [Row("accuracy, held-out texts", "" if before is None else _percent(before), _percent(after))]


def _percent(found: dict) -> str:
    spread = "" if found["stderr"] is None else f" ± {100 * found['stderr']:.1f}"
    return f"{100 * found['accuracy']:.1f}{spread} %"


def _agreement(metrics: dict) -> list[Row]:
    return [
        Row("KL from the original, nats a token", "0", f"{metrics['kl']:.4f}"),
        Row("same top-1 token as the original", "100 %", f"{100 * metrics['top1']:.1f} %"),
    ]


def _latency(metrics: dict) -> list[Row]:
    rows = []
    for kind in ("prefill", "decode"):
        before, after, decoded = (metrics[key][kind] for key in ("before", "after", "decoded"))
        if before is not None:
            rows.append(Row(f"{kind}, tokens/s", _speed(before), _speed(after)))
            rows.append(Row(f"{kind}, tokens/s, decoded once", "", _speed(decoded)))
    return rows


def _speed(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e7 else f"{count / 1e6:.3f} MB"


_METRICS = {
    "evaluate.perplexity": _perplexity,
    "evaluate.accuracy": _accuracy,
    "evaluate.agreement": _agreement,
    "evaluate.latency": _latency,
}
