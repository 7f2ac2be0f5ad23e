"""Distillation: a model learns to predict what a larger, or uncompressed, model predicts."""

METHODS = ("logits",)
