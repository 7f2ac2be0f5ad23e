"""The benchmark of distillation, on a small problem: its variants compute one loss, and a step is measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc, which only Linux has")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import bench_distillation

    yield bench_distillation
    sys.modules.pop("bench_distillation", None)


@linux
def test_all_variants_compute_one_loss(bench):
    rows = [bench.measure_loss(variant, 128, 300, 16, torch.float32) for variant in bench.VARIANTS]
    for row in rows[1:]:
        for key in ("loss", "hidden", "head"):
            assert row[key] == pytest.approx(rows[0][key], rel=1e-5)
    assert rows[0]["loss"] > 0


def test_a_step_is_measured_beside_its_parts(bench, tmp_path):
    small = ["--vocabulary", "96", "--width", "36", "--layers", "1", "--teacher-layers", "2", "--length", "8"]
    assert bench.main(["step", *small, "--rounds", "1", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["variant"] for row in rows] == ["parts", "step"]
    assert all(row["seconds"] > 0 for row in rows)
