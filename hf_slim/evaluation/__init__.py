"""Evaluation: perplexity, agreement with the original, speed."""

METHODS = ("perplexity", "agreement", "latency")
