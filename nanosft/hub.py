"""Models of the Hugging Face hub, in the hub's usual cache, where other programs find them too.

HF_HUB_CACHE, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and HF_TOKEN_PATH mean what they mean there. A repository
is `owner/name`.
"""
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from nanosft.console import UserError, status
from nanosft.files import atomic_file, read_json, sha256_of

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name
SAFE = re.compile(r"[\w-][\w. -]*")  # a name that may become a directory's
INDEX = "model.safetensors.index.json"  # of weights in several files: which tensor stands in which
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
             "generation_config.json")  # what lies beside the weights, where a model has it


def home():
    """The directory of the hub's programs."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("HF_HOME", os.path.join(cache, "huggingface"))).expanduser()


def folder_of(repository, kind="models"):
    hub = Path(os.environ.get("HF_HUB_CACHE", home() / "hub")).expanduser()
    return hub / f"{kind}--{repository.replace('/', '--')}"


def endpoint():
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def is_offline():
    return os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON")


def shards_of(index):
    """The files that an index, of this path, names."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(re.fullmatch(r"[\w.-]+", str(name)) for name in names.values()):
        raise UserError(f"{index} names no files; download or write it again")
    return [index.parent / name for name in sorted(set(map(str, names.values())))]


def cached(repository):
    """The directory of a repository in the hub's cache, if it holds all weights; else None."""
    try:
        commit = (folder_of(repository) / "refs" / "main").read_text().strip()
    except OSError:
        return None
    directory = folder_of(repository) / "snapshots" / commit
    whole = any((directory / name).is_file() for name in (
        "model.safetensors", "pytorch_model.bin", "adapter_model.safetensors"))
    if not whole and (directory / INDEX).is_file():
        whole = all(file.is_file() for file in shards_of(directory / INDEX))
    return directory if whole else None


class AsAnswered(urllib.request.HTTPErrorProcessor):
    """Follows no redirect: the hub tells a file's hash with its redirect to the storage server."""

    def http_response(self, request, response):
        return response

    https_response = http_response


def request(url, method):
    """A request with the user's token, which no other server than the hub gets, by a redirect or otherwise."""
    made, token = urllib.request.Request(url, method=method), os.environ.get("HF_TOKEN", "")
    path = Path(os.environ.get("HF_TOKEN_PATH", home() / "token")).expanduser()
    if not token and path.is_file():
        token = path.read_text()
    if token.strip() and url.startswith(f"{endpoint()}/"):
        made.add_unredirected_header("Authorization", f"Bearer {token.strip()}")
    return made


def announced(url):
    """(address, hash, commit) of a file on the hub, which may have moved; None where there is no such file."""
    for _ in range(5):
        with urllib.request.build_opener(AsAnswered).open(request(url, "HEAD"), timeout=30) as response:
            headers, code = response.headers, response.status
        if code in (301, 302, 303, 307, 308) and re.match("/[^/]", headers.get("Location", "")):
            url = urllib.parse.urljoin(url, headers["Location"])  # within the hub: a repository has moved
            continue
        if code == 404:
            return None
        if code >= 400:
            raise urllib.error.HTTPError(url, code, http.client.responses.get(code, ""), headers, None)
        digest = headers.get("X-Linked-Etag") or headers.get("ETag") or ""
        digest, commit = digest.removeprefix("W/").strip('"'), headers.get("X-Repo-Commit", "")
        if re.fullmatch(r"([0-9a-f]{64}|[0-9a-f]{40}) [0-9a-f]{40}", f"{digest} {commit}"):  # they become file names
            return url, digest, commit
        raise ValueError(f"the answer {code} tells no hash and commit")
    raise ValueError("redirected too often")


def hash_of(path, digest):
    """The file's hash of this digest's kind: SHA-256 of a large file, git's SHA-1 of a small one."""
    if len(digest) == 64:
        return sha256_of(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def get(url, path, title):
    """Downloads into a file."""
    with urllib.request.urlopen(request(url, "GET"), timeout=30) as response, atomic_file(path) as target:
        while piece := response.read(1 << 20):
            target.write(piece)
            status(f"downloading {title}: {target.tell() / 1e6:,.0f} MB")
        if target.tell() != int(response.headers.get("Content-Length") or target.tell()):
            raise ValueError(f"{title} came cut short")


def fetch(repository, file):
    """The path of a repository's file in the cache, downloaded and verified if need be; None where the hub lacks it.
    An interrupted download leaves nothing behind."""
    url, folder = f"{endpoint()}/{repository}/resolve/main/{file}", folder_of(repository)
    found = announced(url)
    if found is None:
        return None
    url, digest, commit = found
    blob, snapshot = folder / "blobs" / digest, folder / "snapshots" / commit / file
    for directory in (blob.parent, snapshot.parent, folder / "refs"):
        directory.mkdir(parents=True, exist_ok=True)
    if not blob.exists() or hash_of(blob, digest) != digest:
        get(url, blob, f"{repository}/{file}")
        if hash_of(blob, digest) != digest:
            blob.unlink()
            raise ValueError(f"{file} came damaged")
    if not snapshot.exists():
        try:
            snapshot.symlink_to(os.path.relpath(blob, snapshot.parent))
        except OSError:  # Windows without developer mode
            os.replace(blob, snapshot)
    (folder / "refs" / "main").write_text(commit)
    return snapshot


@contextmanager
def explained(repository):
    """What goes wrong with a download becomes one line with a remedy."""
    try:
        yield
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            raise UserError(f"the download of {repository} failed ({error}); try again later") from None
        raise UserError(f"the hub refuses {repository} ({error.code}): check the name or path; if its page asks you "
                        "to, accept its licence there; then set HF_TOKEN to a token of your account that may read it"
                        ) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the download of {repository} failed ({str(error)[:100] or type(error).__name__}); check the "
                        "network and try again, or name the path of a copy instead") from None


def download(repository):
    """The directory of a repository in the hub's cache, with its weights or LoRA adapter, configuration and tokenizer,
    which are fetched first."""
    if is_offline():
        raise UserError(f"{repository} is not in {folder_of(repository).parent} and HF_HUB_OFFLINE is set; unset it, "
                        "or name the path of a copy")
    with explained(repository):
        print(f"downloading {repository} to {folder_of(repository).parent}", flush=True)
        config = fetch(repository, "config.json") or fetch(repository, "adapter_config.json")
        if config is None:
            raise UserError(f"the hub has no model {repository} with a config.json; check the name")
        for file in TOKENIZER:
            fetch(repository, file)
        weights = config.name.replace("config.json", "model.safetensors")
        if not fetch(repository, weights) and fetch(repository, INDEX):
            for path in shards_of(config.parent / INDEX):
                fetch(repository, path.name)
    if not cached(repository):
        raise UserError(f"{repository} has no {weights}: take another copy of it")
    return config.parent


# ---- data sets ------------------------------------------------------------------------------------------------------

def dataset_files(name):
    """The parquet files of a data set by its name on the hub, owner/name[:config][:split], downloaded once. The config
    is "default" or the only one, the split "train" or the only one, where they are not named."""
    repository, *chosen = name.split(":")
    folder = folder_of(repository, "datasets") / "parquet"
    listing = folder / "listing.json"
    if not REPOSITORY.fullmatch(repository) or len(chosen) > 2:
        raise UserError(f"hf:{name} is no data set; write hf:owner/name, hf:owner/name:split or with :config:split")
    if not is_offline():
        folder.mkdir(parents=True, exist_ok=True)
        with explained(repository):
            get(f"{endpoint()}/api/datasets/{repository}/parquet", listing, repository)
    if not listing.is_file():
        raise UserError(f"{repository} is not in {folder.parent.parent} and HF_HUB_OFFLINE is set; unset it")
    configs = read_json(listing)
    names = [*configs, *(split for splits in configs.values() for split in splits)]
    if not all(isinstance(splits, dict) for splits in configs.values()) or not all(map(SAFE.fullmatch, names)):
        raise UserError(f"the hub's list of {repository}'s files is not as expected; name the path of a copy instead")
    if len(chosen) == 1 and chosen[0] not in configs:
        chosen = ["", *chosen]
    config, split = [*chosen, "", ""][:2]
    config = pick(configs, config, "default", f"{repository}'s configs")
    split = pick(configs[config], split, "train", f"{repository}'s splits")
    paths = []
    for number, url in enumerate(configs[config][split]):
        paths.append(folder / config / split / f"{number:04d}.parquet")
        if not paths[-1].is_file():
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            with explained(repository):
                get(url, paths[-1], f"{repository} {config} {split} {number}")
    return paths


def pick(found, name, usual, what):
    """The named key or, without a name, the usual or the only one."""
    if not name:
        name = usual if usual in found or len(found) != 1 else next(iter(found))
    if name not in found:
        raise UserError(f"{what} are {', '.join(found)}; name one as in hf:owner/name:config:split")
    return name
