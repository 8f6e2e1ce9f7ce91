"""Where a model lies: on disk, or on the Hugging Face hub, in the hub's usual cache; and the hub's data sets.

HF_HUB_CACHE, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and HF_TOKEN_PATH mean what they mean there.
"""
import os
import re
from collections import ChainMap
from contextlib import contextmanager
from pathlib import Path

from nanosft.console import UserError, status
from nanosft.files import atomic_file, read_json, sha256_of, write_json

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name
SAFE = re.compile(r'[^./\\:*?"<>|\0][^/\\:*?"<>|\0]*')  # a name that may become a directory's
INDEX = "model.safetensors.index.json"  # of weights in several files: which tensor stands in which
# n_layer, n_head, n_embd of OpenAI's weights
SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
PICKLES = (".bin", ".pt", ".pth")  # what torch.save writes
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
             "chat_template.jinja")  # what lies beside the weights, where a model has it


def home():
    """The directory of the hub's programs."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("HF_HOME", os.path.join(cache, "huggingface"))).expanduser()


def folder_of(repository, kind="models"):
    hub = Path(os.environ.get("HF_HUB_CACHE", home() / "hub")).expanduser()
    return hub / f"{kind}--{repository.replace('/', '--')}"


def endpoint():
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def weight_files(path):
    """What locate has found, or the files that it names where it is their index."""
    if path.name != INDEX:
        return [path]
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not all(re.fullmatch(r"[\w.-]+", str(name)) for name in names.values()):
        raise UserError(f"{path} names no files; download or write it again")
    return [path.parent / name for name in sorted(set(map(str, names.values())))]


def cached(repository):
    """The directory of a repository in the hub's cache, if it holds a configuration and all weights; else None."""
    main = folder_of(repository) / "refs" / "main"
    if not main.is_file():
        return None
    directory = folder_of(repository) / "snapshots" / main.read_text().strip()
    weights = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", INDEX)
    whole = any((directory / name).is_file() and all(map(Path.is_file, weight_files(directory / name)))
                for name in weights)
    described = any((directory / name).is_file() for name in ("config.json", "adapter_config.json"))
    return directory if whole and described else None


def ask(url):
    """The answer to a GET, of any status. The user's token goes to the hub, not to a host that this sends on to."""
    import requests  # comes with tiktoken
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        raise UserError(f"{url} is not in the cache and HF_HUB_OFFLINE is set; unset it, or name the path of a copy")
    headers, token = {"Accept-Encoding": "identity"}, os.environ.get("HF_TOKEN", "")
    path = Path(os.environ.get("HF_TOKEN_PATH", home() / "token")).expanduser()
    if not token and path.is_file():
        token = path.read_text()
    if token.strip() and url.startswith(f"{endpoint()}/"):
        headers["Authorization"] = f"Bearer {token.strip()}"
    session = requests.Session()
    settings = session.merge_environment_settings(url, {}, True, None, None)  # the user's proxies and certificates
    session.trust_env = False  # but no netrc, which would take the token's place
    session.rebuild_proxies = requests.utils.resolve_proxies  # where the hub sends on to, others may be the user's
    return session.get(url, headers=headers, timeout=30, **settings)


def save(response, path, title, digest=""):
    """Writes an answer into a file, wholly or not at all. digest: its SHA-256, which the hub tells of a large file."""
    response.raise_for_status()
    response.raw.enforce_content_length = True  # urllib3 1 takes an answer that was cut short
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        for piece in response.iter_content(1 << 20):
            file.write(piece)
            status(f"downloading {title}: {file.tell() / 1e6:,.0f} MB")
        file.flush()
        if len(digest) == 64 and sha256_of(file.name) != digest:
            raise ValueError(f"{title} came damaged")


def fetch(repository, file, commit="main"):
    """The path of a repository's file in the cache, downloaded if need be; None where the hub lacks it."""
    title = f"{repository}/{file}"
    with ask(f"{endpoint()}/{repository}/resolve/{commit}/{file}") as response:
        if response.status_code == 404:
            return None
        response.raise_for_status()
        told = ChainMap(*(answer.headers for answer in (*response.history, response)))  # the hub's before its storage's
        commit, digest = told.get("X-Repo-Commit", ""), told.get("X-Linked-Etag", "").strip('"')
        if not re.fullmatch("[0-9a-f]{40}", commit):
            raise ValueError(f"the hub tells no commit of {title}")
        path = folder_of(repository) / "snapshots" / commit / file
        if not path.is_file():
            save(response, path, title, digest)
        return path


@contextmanager
def explained(repository):
    """What goes wrong with a download becomes one line with a remedy."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:
        code = getattr(getattr(error, "response", None), "status_code", None)  # of an answer that requests refused
        if code in (401, 403):
            raise UserError(f"the hub refuses {repository} ({code}): check the name; accept the licence on its page, "
                            "if it has one, and set HF_TOKEN to a token that may read it") from None
        raise UserError(f"the download of {repository} failed ({str(error)[:100] or type(error).__name__}); check the "
                        "name and the network and try again, or name the path of a copy instead") from None


def download(repository):
    """Fetches a repository's weights or adapter, configuration and tokenizer; returns its directory in the cache."""
    with explained(repository):
        config = fetch(repository, "config.json") or fetch(repository, "adapter_config.json")
        if config is None:
            raise UserError(f"the hub has no model {repository} with a config.json; check the name")
        print(f"downloading {repository} to {folder_of(repository).parent}", flush=True)
        commit = config.parent.name  # of all files, though the repository may change meanwhile
        for file in (*TOKENIZER, "vocab.json"):  # the last tells whose an old GPT-2's tokens are
            fetch(repository, file, commit)
        weights = config.name.replace("config.json", "model.safetensors")
        if not fetch(repository, weights, commit) and fetch(repository, INDEX, commit):
            for path in weight_files(config.parent / INDEX):
                fetch(repository, path.name, commit)
        (folder_of(repository) / "refs").mkdir(exist_ok=True)
        (folder_of(repository) / "refs" / "main").write_text(commit)
    if not cached(repository):
        raise UserError(f"{repository} has no {weights}: take another copy of it")
    return config.parent


# ---- where a model lies ---------------------------------------------------------------------------------------------

def base_of(path):
    """The weights file of the base that an adapter_config.json names."""
    base = read_json(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not (base in SIZES or REPOSITORY.fullmatch(base) or os.path.exists(base)):
        raise UserError(f"{path}: its base {base!r} is not there; write as base_model_name_or_path where it is now")
    found = locate(base.removeprefix("openai-community/"))
    if found.name == path.name:
        raise UserError(f"{path}: the base {base} is itself an adapter; name plain weights there")
    return found


def base_trained_on(path):
    """What base_of finds, if it is what this adapter was trained on, where prompt.json beside it tells."""
    base, stored = base_of(path), path.parent / "prompt.json"
    trained_on = read_json(stored).get("base_sha256") if stored.is_file() else None
    if trained_on and sha256_of(*weight_files(base)) != trained_on:
        raise UserError(f"{path.parent} was trained on other weights than {base} holds; write the path of those into "
                        f"{path} as base_model_name_or_path")
    return base


def locate(name_or_path):
    """The weights file, index of several, or adapter_config.json behind a name on the hub, a directory or a file."""
    path = Path(name_or_path)
    is_name = name_or_path in SIZES or REPOSITORY.fullmatch(name_or_path)
    if is_name and not path.exists():
        repository = name_or_path if "/" in name_or_path else f"openai-community/{name_or_path}"
        path = cached(repository) or cached(name_or_path) or download(repository)  # many caches know gpt2 as such
    for directory in (path / "best", path / "last", path):
        for name in ("adapter_config.json", "model.safetensors", INDEX, "pytorch_model.bin"):
            if (directory / name).is_file():
                return directory / name
    if path.is_dir():
        raise UserError(f"{path} holds no model.safetensors or adapter_config.json: name a directory with a model")
    if not path.is_file() or path.suffix not in (".safetensors", *PICKLES) and path.name != INDEX:
        raise UserError(f"no model {name_or_path!r}: expected {', '.join(SIZES)}, owner/name on the hub, a directory "
                        "or file of weights, nanoGPT's ckpt.pt, or an out_dir of train.py, once that has run")
    return path


# ---- data sets ------------------------------------------------------------------------------------------------------

def dataset_files(name):
    """The parquet files of a data set by its name on the hub, owner/name[:config][:split], downloaded once. The config
    is "default" or the only one, the split "train" or the only one, where they are not named."""
    repository, *chosen = name.split(":")
    folder = folder_of(repository, "datasets") / "parquet"
    listing = folder / "listing.json"
    if not REPOSITORY.fullmatch(repository) or len(chosen) > 2:
        raise UserError(f"hf:{name} is no data set; write hf:owner/name, hf:owner/name:split or with :config:split")
    if not listing.is_file():
        with explained(repository):
            response = ask(f"{endpoint()}/api/datasets/{repository}/parquet")
            response.raise_for_status()
            configs = response.json()
        if not is_listing(configs):
            raise UserError(f"the hub's list of {repository}'s files is not as expected; name the path of a copy")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(listing, configs)
    configs = read_json(listing)
    if len(chosen) == 1 and chosen[0] not in configs:
        chosen = ["", *chosen]
    config, split = [*chosen, "", ""][:2]
    config = pick(configs, config, "default", f"{repository}'s configs")
    split = pick(configs[config], split, "train", f"{repository}'s splits")
    paths = []
    for number, url in enumerate(configs[config][split]):
        paths.append(folder / config / split / f"{number:04d}.parquet")
        if not paths[-1].is_file():
            with explained(repository):
                save(ask(url), paths[-1], f"{repository} {config} {split} {number}")
    return paths


def is_listing(configs):
    """Whether the hub's answer is {config: {split: [URL, ...]}}, with names that can be directories'."""
    return isinstance(configs, dict) and bool(configs) and all(
        SAFE.fullmatch(config) and isinstance(splits, dict) and all(
            SAFE.fullmatch(split) and isinstance(urls, list) for split, urls in splits.items())
        for config, splits in configs.items())


def pick(found, name, usual, what):
    """The named key or, without a name, the usual or the only one."""
    if not name:
        name = usual if usual in found or len(found) != 1 else next(iter(found))
    if name not in found:
        raise UserError(f"{what} are {', '.join(found)}; name one as in hf:owner/name:config:split")
    return name
