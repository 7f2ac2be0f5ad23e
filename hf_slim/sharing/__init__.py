"""Parameter sharing: many weights, few distinct values."""

METHODS = ("kmeans", "deep_kmeans", "recluster", "lnq", "vq", "hashed", "low_rank", "tie", "basis")
