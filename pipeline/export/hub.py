"""An exported directory on Hugging Face's hub, where timm finds it as `hf-hub:OWNER/NAME`."""

from pathlib import Path

from huggingface_hub import HfApi

from shards.errors import UserError


def push(directory: Path, repository: str) -> str:
    """Uploads every file, into a repository that is made if need be; where they are.

    Raises UserError where the hub cannot be reached, or does not let us in.
    """
    api = HfApi(library_name="vittm-pipeline")
    try:
        repository = api.create_repo(repository, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=repository, folder_path=directory, commit_message="Add model"))
    except Exception as error:  # whatever the hub, its client or the network answer
        raise UserError(
            f"{directory} is exported, but cannot be pushed to {repository} ({error}): log in with `hf auth login` or "
            "set HF_TOKEN, and push the directory again with `hf upload`"
        ) from error
