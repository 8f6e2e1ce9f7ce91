"""Files of the Hugging Face hub, in the hub's usual cache, where other programs find them too.

HF_HUB_CACHE, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean there. A repository is `owner/name`.
"""
import http.client
import os
import re
import urllib.error
import urllib.request
from pathlib import Path

import torch

from nanosft.console import UserError


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


class KeepRedirect(urllib.request.HTTPRedirectHandler):
    """Does not follow: the hub tells a file's hash and size with its redirect to the storage server."""

    def redirect_request(self, *args):
        return None


def announced(url):
    """(etag, size, commit) of a file on the hub; the etag of a large file is its SHA-256."""
    request = urllib.request.Request(url, method="HEAD")
    try:
        headers = urllib.request.build_opener(KeepRedirect).open(request, timeout=30).headers
    except urllib.error.HTTPError as error:
        if error.code not in (301, 302, 303, 307, 308):
            raise
        headers = error.headers
    etag = (headers.get("X-Linked-Etag") or headers.get("ETag", "")).removeprefix("W/").strip('"')
    size = headers.get("X-Linked-Size") or headers.get("Content-Length", "")
    commit = headers.get("X-Repo-Commit", "")
    if not re.fullmatch(r"(\w{40}|\w{64}) \d+ \w{40}", f"{etag} {size} {commit}", re.ASCII):  # they become file names
        raise ValueError("it gave no hash, size and commit")
    return etag, int(size), commit


def download(repository, file):
    """Fetches a repository's file into the hub's cache and returns its path. Its size and, where it is large, its hash
    are verified, and an interrupted download leaves nothing behind."""
    folder = folder_of(repository)
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        raise UserError(f"{repository} is not in {folder.parent} and HF_HUB_OFFLINE is set; unset it, or name the path "
                        "of a copy")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    url = f"{endpoint}/{repository}/resolve/main/{file}"
    try:
        etag, size, commit = announced(url)
        blob, snapshot = folder / "blobs" / etag, folder / "snapshots" / commit / file
        for directory in (blob.parent, snapshot.parent, folder / "refs"):
            directory.mkdir(parents=True, exist_ok=True)
        if not blob.exists() or blob.stat().st_size != size:
            print(f"downloading {repository} ({size / 1e6:,.0f} MB) from {endpoint} to {folder.parent}", flush=True)
            torch.hub.download_url_to_file(url, str(blob), hash_prefix=etag if len(etag) == 64 else None)
        if blob.stat().st_size != size:
            blob.unlink()
            raise ValueError("its size is not the one announced")
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
