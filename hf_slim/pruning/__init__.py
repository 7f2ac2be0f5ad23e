"""Pruning: drop weights, and store only those that remain."""

METHODS = (
    "magnitude",
    "wanda",
    "sparsegpt",
    "alps",
    "gradual",
    "apoz",
    "heads",
    "depth",
    "width",
    "vocabulary",
    "structurize",
)
