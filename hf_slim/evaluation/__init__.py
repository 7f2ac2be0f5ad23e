"""Evaluation: perplexity, accuracy, agreement with the original, speed."""

METHODS = ("perplexity", "accuracy", "agreement", "latency")
