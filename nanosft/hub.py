"""Files of the Hugging Face hub, in the hub's usual cache, where other programs find them too.

HF_HUB_CACHE, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean there. A repository is `owner/name`.
"""
import http.client
import os
import re
import urllib.request
from pathlib import Path

import torch

from nanosft.console import UserError
from nanosft.files import sha256_of


def folder_of(repository):
    home = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", os.path.join(home, "hub"))).expanduser()
    return hub / f"models--{repository.replace('/', '--')}"


def cached(repository, file):
    """The path of a repository's file in the hub's cache, or None."""
    try:
        commit = (folder_of(repository) / "refs" / "main").read_text().strip()
    except OSError:
        return None
    path = folder_of(repository) / "snapshots" / commit / file
    return path if path.is_file() else None


class AsAnswered(urllib.request.HTTPErrorProcessor):
    """Follows no redirect: the hub tells a file's hash with its redirect to the storage server."""

    def http_response(self, request, response):
        return response

    https_response = http_response


def announced(url):
    """(SHA-256, commit) of a large file on the hub."""
    request = urllib.request.Request(url, method="HEAD")
    with urllib.request.build_opener(AsAnswered).open(request, timeout=30) as response:
        digest = response.headers.get("X-Linked-Etag", "").strip('"')
        commit = response.headers.get("X-Repo-Commit", "")
    if not re.fullmatch(r"[0-9a-f]{64} [0-9a-f]{40}", f"{digest} {commit}"):  # they become file names
        raise ValueError(f"the answer {response.status} tells no hash and commit")
    return digest, commit


def download(repository, file):
    """Fetches a repository's file into the hub's cache and returns its path. Its hash is verified, and an interrupted
    download leaves nothing behind."""
    folder = folder_of(repository)
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        raise UserError(f"{repository} is not in {folder.parent} and HF_HUB_OFFLINE is set; unset it, or name the path "
                        "of a copy")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    url = f"{endpoint}/{repository}/resolve/main/{file}"
    try:
        digest, commit = announced(url)
        blob, snapshot = folder / "blobs" / digest, folder / "snapshots" / commit / file
        for directory in (blob.parent, snapshot.parent, folder / "refs"):
            directory.mkdir(parents=True, exist_ok=True)
        if not blob.exists() or sha256_of(blob) != digest:
            print(f"downloading {repository} from {endpoint} to {folder.parent}", flush=True)
            torch.hub.download_url_to_file(url, str(blob), hash_prefix=digest)
        try:
            snapshot.symlink_to(os.path.relpath(blob, snapshot.parent))
        except OSError:  # it is there already, or this is Windows without developer mode
            os.replace(blob, snapshot)
        (folder / "refs" / "main").write_text(commit)
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:  # RuntimeError: another hash
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise UserError(f"the download of {repository} failed ({reason}); check the network and try again, or name the "
                        f"path of a copy instead (from {url})") from None
    return snapshot
