"""Quantization: store weights in fewer bits."""

METHODS = ("rtn", "hqq", "gptq", "qat", "scales")
