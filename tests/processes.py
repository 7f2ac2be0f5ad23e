"""Several processes that work together as `accelerate launch` starts them, without the time that starting one takes.

A server imports the libraries once, and every process is forked from it.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "accelerate", "transformers.trainer", "transformers.models.llama"])


def together(function: Callable[..., Any], *args: Any, count: int = 2) -> list[Any]:
    """What a module's function returns in each of `count` processes, by rank: tensors, numbers, lists and dicts."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        shared = (count, port, folder, function, args)
        processes = [FORKS.Process(target=_run, args=(rank, *shared)) for rank in range(count)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(280)
            process.kill()
        errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        assert not errors, "\n".join(errors)
        return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(count)]


def _run(rank: int, count: int, port: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update(
        {name: str(value) for name, value in numbers.items()}, MASTER_ADDR="127.0.0.1", ACCELERATE_USE_CPU="true"
    )
    torch.set_num_threads(1)
    try:
        torch.save(function(*args), f"{folder}/{rank}.pt")
    except BaseException:
        Path(f"{folder}/{rank}.error").write_text(traceback.format_exc())
        raise
