"""Parameter sharing: many weights, few distinct values."""

METHODS = ("kmeans", "deep_kmeans", "hashed")
