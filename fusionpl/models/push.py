"""Pushing a folder to the hub as a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils._validators import validate_repo_id

from fusionpl.errors import FusionError, reason

LOGIN = "log in with: hf auth login"
# A push replaces all of these: weights in other shards than before would be read beside the new ones.
REPLACED = ["*.safetensors", "*.safetensors.index.json", "report/*"]


def check_push(repo: str, *, private: bool) -> None:
    """Refuses what can't be pushed to, as far as that shows beforehand; changes nothing.

    Args:
        repo: `org/name`.
        private: whether what is pushed must not be seen by others.

    Raises:
        FusionError: `repo` is no such name, nobody is logged in or not with a token that writes there, the hub can't be
            reached, or the repository is there and public against `private`.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise FusionError(f"'{repo}' is no name of a repository ({reason(error)}); give org/name") from error
    if "/" not in repo:
        raise FusionError(f"'{repo}' lacks whose repository it is; give org/name")
    hub = huggingface_hub.HfApi()
    try:
        user = hub.whoami()
        _check_token(user, repo)
        public = not hub.model_info(repo).private
    except RepositoryNotFoundError:
        return
    except LocalTokenNotFoundError as error:
        raise FusionError(f"cannot push to {repo}: nobody is logged in to the hub; {LOGIN}") from error
    except HfHubHTTPError as error:
        raise FusionError(f"cannot push to {repo}: the hub refuses ({reason(error)}); {LOGIN}") from error
    except FusionError:
        raise
    except Exception as error:  # the HTTP library's and the system's errors
        raise FusionError(f"cannot push to {repo}: the hub can't be reached ({reason(error)})") from error
    if public and private:
        raise FusionError(
            f"{repo} is there and public; add --private false (fuse and finetune: --push-private false), or push to "
            "another name"
        )


def push(folder: Path, repo: str, *, private: bool, message: str) -> str:
    """Makes a commit of a folder; the repository is made where there is none.

    Weights and reports of earlier pushes go with it, other files stay.

    Args:
        folder: what is pushed, as it is.
        repo, private: see `check_push`; a repository that is there stays as private as it is.
        message: of the commit.

    Returns:
        The address of the model.

    Raises:
        FusionError: it did not work out.
    """
    hub = huggingface_hub.HfApi()
    try:
        address = hub.create_repo(repo, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, delete_patterns=REPLACED)
    except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's errors
        raise FusionError(f"cannot push to {repo}: {reason(error)}") from error
    return str(address)


def _check_token(user: Mapping[str, Any], repo: str) -> None:
    """A token that only reads is refused, and one that writes to other names than the repository's."""
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise FusionError(f"cannot push to {repo}: the token only reads; {LOGIN}, with one that writes")
    names = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    if role == "write" and repo.partition("/")[0] not in names:  # a token of finer grain doesn't list all it may
        raise FusionError(f"cannot push to {repo}: {user['name']} writes to {', '.join(names)}")
