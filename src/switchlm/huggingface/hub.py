"""Find a model: a run, a model folder, or a name on the Hugging Face hub."""

import re
from pathlib import Path

from switchlm.errors import CheckpointError, MissingExtraError

CONFIG = "config.json"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?", re.ASCII)
_SMALL_FILES = ("*.json", "tokenizer*", "*.txt", "README.md")


def find_model(name: str | Path, *, revision: str | None, local_files_only: bool) -> Path:
    """Return the folder of a model: DIR/model of a run, DIR itself, or the cached files of the hub.

    Cache, offline mode and token are huggingface_hub's own (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN).
    """
    folder = Path(name)
    if (folder / CONFIG).is_file():
        return folder
    if (folder / "model" / CONFIG).is_file():
        return folder / "model"
    if folder.exists():
        raise CheckpointError(
            f"{str(name)!r} is neither a model folder ({CONFIG} is missing) nor a run with a saved "
            "model in it."
        )
    if isinstance(name, Path) or not HUB_NAME.fullmatch(name):
        raise CheckpointError(f"There is no folder {str(name)!r}, and it is no name on the hub.")
    return _download(name, revision, local_files_only)


def _download(name: str, revision: str | None, local_files_only: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError:
        raise MissingExtraError(
            "huggingface_hub", "hub", f"Loading {name!r} from the hub"
        ) from None

    def fetch(*patterns: str) -> Path:
        try:
            return Path(
                snapshot_download(
                    name,
                    revision=revision,
                    local_files_only=local_files_only,
                    allow_patterns=[*_SMALL_FILES, *patterns],
                )
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise CheckpointError(
                f"There is no folder {name!r}, and the hub could not give it: {str(error)[:300]}"
            ) from None

    folder = fetch("*.safetensors")
    if not any(folder.glob("*.safetensors")):
        folder = fetch("*.bin")
    return folder
