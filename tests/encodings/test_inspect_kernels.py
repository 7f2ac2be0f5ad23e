"""`hf-slim inspect` says how this machine multiplies by what is stored, and why not faster."""

from __future__ import annotations

import pytest
import tiny
import torch

import hf_slim
from hf_slim.cli import main
from hf_slim.core.model import ModelSource
from hf_slim.inspect import inspect_model


@pytest.fixture
def folder(tmp_path):
    model = tiny.gpt2(torch.float32)  # 48 columns in attention, 192 in the second half of the MLP
    hf_slim.compress(model, "quantize.rtn", bits=4, group_size=32)
    return tiny.save(model, tmp_path / "model")


def test_each_kind_of_weight_is_listed_once_with_its_reason(folder, capsys):
    kernels = inspect_model(ModelSource(str(folder)))["kernels"]
    assert sorted((k["few"], k["layers"]) for k in kernels) == [("decoded to float32", 6), ("int4 kernel", 2)]
    reasons = [k["why_not"] for k in kernels if k["few"] != "int4 kernel"]
    assert reasons == ["the kernels take whole runs of 32 columns, which 48 are not"]
    assert main(["inspect", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(reasons[0]) == 1
    assert "int4 kernel" in printed


def test_a_dense_model_has_no_such_list(tmp_path, capsys):
    folder = tiny.save(tiny.gpt2(), tmp_path / "model")
    assert inspect_model(ModelSource(str(folder)))["kernels"] == []
    assert main(["inspect", str(folder)]) == 0
    assert "kernel" not in capsys.readouterr().out
