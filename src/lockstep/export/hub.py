"""Exported folders to the Hugging Face hub."""

from pathlib import Path

from lockstep.errors import UserError, first_line


def require_token(repository: str) -> None:
    """Raise UserError unless USER/NAME could be written to, as far as one can know without asking: nothing prompts."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub={repository} names no repository, as in USER/NAME") from error
    if repository.count("/") != 1:
        raise UserError(f"--push-to-hub={repository} names no repository, as in USER/NAME")
    if constants.HF_HUB_OFFLINE:
        raise UserError("--push-to-hub: HF_HUB_OFFLINE is set: unset it, or push the folder from another machine")
    if not get_token():
        raise UserError("--push-to-hub needs a token: run `hf auth login` once, or set HF_TOKEN")


def push(folder: Path, repository: str) -> str:
    """Upload a folder into a repository of models, which is made, and private, if need be; returns its address.

    Raises UserError if the hub is out of reach or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        place = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Add a network by lockstep export")
    except Exception as error:  # of whichever HTTP library this version of the client has
        raise UserError(
            f"--push-to-hub={repository}: the hub did not take it ({first_line(error)}); {folder} is whole, and "
            f"`hf upload {repository} {folder}` tries again"
        ) from error
    return str(place)
