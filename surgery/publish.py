"""Upload an exported checkpoint with its card to the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi


def check_repository(repository: str) -> None:
    """Raise ValueError for a name that is not `user/name`."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"--push-to-hub {repository!r}: expected user/name")


def push_to_hub(folder: str | Path, repository: str) -> str:
    """Create `repository` where it is missing, upload every file of `folder` in one commit, and
    return its address.

    Raises ValueError for a name that is not `user/name` and for a folder without weights or card,
    before anything is sent; the hub's own errors (no login, no network) are OSErrors.
    """
    check_repository(repository)
    folder = Path(folder)
    missing = [name for name in ("config.json", "README.md") if not (folder / name).is_file()]
    missing += [] if list(folder.glob("*.safetensors")) else ["*.safetensors"]
    if missing:
        raise ValueError(
            f"{folder}: {', '.join(missing)} not found: expected the checkpoint of a finished run"
        )
    api = HfApi()
    api.create_repo(repository, exist_ok=True)
    api.upload_folder(
        repo_id=repository, folder_path=folder, commit_message="Checkpoint edited with Lethe"
    )
    return f"https://huggingface.co/{repository}"
