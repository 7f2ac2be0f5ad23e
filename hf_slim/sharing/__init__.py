"""Parameter sharing: many weights, few distinct values."""

METHODS = ("kmeans", "hashed")
