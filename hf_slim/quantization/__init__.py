"""Quantization: store weights in fewer bits."""

METHODS = ("rtn", "hqq", "bnb", "gptq", "autoround", "blockwise", "awq", "smoothquant", "qat", "scales")
