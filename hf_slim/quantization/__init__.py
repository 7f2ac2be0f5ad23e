"""Quantization: store weights in fewer bits."""

METHODS = ("rtn", "hqq", "gptq", "autoround", "blockwise", "awq", "smoothquant", "qat", "scales")
