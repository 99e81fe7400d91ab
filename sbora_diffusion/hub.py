"""An export on the model hub, through huggingface_hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from sbora_diffusion.core.errors import ConfigError, ResourceError


def push_to_hub(folder: Path, repository: str, api: Any = None) -> str:
    """Upload a folder; a repository that does not exist yet is made, and is private.

    Args:
        repository: "user/name".
        api: an `HfApi`; by default one with the token of `hf auth login` or HF_TOKEN.

    Returns:
        The repository's address.

    Raises:
        ConfigError: `repository` is no name of one.
        ResourceError: the hub cannot be reached, or refuses.
    """
    api = api or HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        what = f"Upload {folder.name}"
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message=what)
    except HFValidationError as error:
        raise ConfigError(f"{repository!r} is no repository: {error}", "e.g. user/name") from error
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise ResourceError(
            f"{folder} is written, but {repository!r} does not take it: {error}",
            "see `hf auth login`",
        ) from error
    return str(address)
