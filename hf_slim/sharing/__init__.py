"""Parameter sharing: many weights, few distinct values."""

METHODS = ("kmeans", "deep_kmeans", "recluster", "hashed", "low_rank", "tie")
