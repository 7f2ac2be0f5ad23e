"""The run-time type checker that the test run puts around every annotated function of hf_slim.

Named by `--jaxtyping-packages` in pyproject.toml. beartype alone refuses an int where a float is annotated; Python's
typing rules (PEP 484) accept it, and so do the kernels.
"""

from __future__ import annotations

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
