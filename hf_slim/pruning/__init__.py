"""Pruning: drop weights, and store only those that remain."""

METHODS = ("magnitude", "gradual", "apoz", "structurize")
