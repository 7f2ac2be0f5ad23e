"""Quantization: store weights in fewer bits."""

METHODS = ("rtn", "gptq", "qat", "scales")
