"""Uploads a VisualChat folder, or a PEFT adapter of one, to the Hugging Face Hub: `visualchat push`."""

import argparse
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError


# Of the folder's own files, no subfolder's. Pickles are no part of a repository: `training_args.bin` may hold a token.
PUBLISHED = re.compile(
    r".+\.(safetensors|json|jinja|py|model|png|jpe?g)|README\.md|(LICEN[CS]E|NOTICE|USE_POLICY)(\.(md|txt))?|(merges|vocab)\.txt"
)
RUN_STATE = ("trainer_state.json",)
REPLACED = re.compile(r".+\.(safetensors(\.index\.json)?|py)")  # a later push removes what it does not bring
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
CODE_BEGIN, CODE_END = "<!-- code: written by visualchat push -->", "<!-- end of code -->"
# What traveling code does with files and network, and only when asked to: tests/hub/test_traveling_code.py
EXCEPTIONS = {
    "`ImageMemory.save`, `ImageMemoryStore` with a `folder`": "write image memories",
    "`ChatSession.save`": "writes a conversation and its pictures",
    "`load_image` of a URL, and so the processor and a chat that are given one": "fetch a picture",
    "`save_pretrained`, `push_to_hub`": "as in transformers",
}
CODE_SECTION = """\
{begin}
## What `trust_remote_code=True` runs

{table}

Loading, `forward` and `generate` open no connection, start no process and write no file beyond transformers' own cache. Only
when they are called: {exceptions}. Give `revision="<commit>"` to run these very files.
{end}
"""


@dataclass(frozen=True)
class Publication:
    """
    What a push sends.

    Args:
        contents (`dict[str, Path | bytes]`): By name in the repository.
        base_model (`str`, *optional*): An adapter's base.
        left_out (`list[str]`): Names in the folder that are not sent.
        code (`list[str]`): The code files among `contents`.
    """

    contents: dict[str, Path | bytes]
    left_out: list[str]
    code: list[str]
    base_model: str | None

    def describe(self) -> str:
        """Every file with its size in bytes and its SHA-256."""
        lines = [f"{size:>15,}  {digest}  {name}" for name, size, digest in map(self.measure, sorted(self.contents))]
        return "\n".join([*lines, *(f"{'left out':>15}  {name}" for name in self.left_out)])

    def measure(self, name: str) -> tuple[str, int, str]:
        """Name, size in bytes and SHA-256 of one file."""
        content = self.contents[name]
        if isinstance(content, bytes):
            return name, len(content), hashlib.sha256(content).hexdigest()
        digest = hashlib.sha256()
        with content.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
        return name, content.stat().st_size, digest.hexdigest()


def collect(folder: Path, base_model: str | None = None, token: str | None = None) -> Publication:
    """
    Checks that a folder loads elsewhere, and collects what is published of it. The folder stays as it is.

    Args:
        folder (`Path`): A saved model or adapter, with its processor.
        base_model (`str`, *optional*): Hub id of an adapter's base, if the adapter names a folder.
        token (`str`, *optional*): The access token, which no file may hold.

    Raises:
        FileNotFoundError, ValueError: Naming the file that is missing or at fault, and what to do.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}")
    contents: dict[str, Path | bytes] = {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and PUBLISHED.fullmatch(path.name) and path.name not in RUN_STATE
    }
    is_adapter = "adapter_config.json" in contents
    _check_weights(folder, contents, "adapter_model" if is_adapter else "model")
    for name in ("processor_config.json", "chat_template.jinja", "tokenizer_config.json"):
        if name not in contents:
            raise FileNotFoundError(f"{folder} has no {name}: save the processor there, by processor.save_pretrained")
    code = find_code(folder)
    for name in [name for name in contents if name.endswith(".py") and name not in code]:
        del contents[name]  # nothing runs it
    if is_adapter:
        contents["adapter_config.json"], base_model = _name_base(folder / "adapter_config.json", base_model)
    contents["README.md"] = b""  # takes part in what is there
    publication = Publication(
        contents=contents,
        left_out=sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if path.name not in contents),
        code=code,
        base_model=base_model if is_adapter else None,
    )
    contents["README.md"] = write_card(folder, publication).encode()
    for name, content in contents.items():
        if not name.endswith(".safetensors"):
            data = content if isinstance(content, bytes) else content.read_bytes()
            if TOKEN.search(data) or (token and token.encode() in data):
                raise ValueError(f"{folder / name} holds an access token: remove it, and revoke it if others have seen it")
    return publication


def _check_weights(folder: Path, contents: dict[str, Path | bytes], stem: str) -> None:
    config = "adapter_config.json" if stem == "adapter_model" else "config.json"
    if config not in contents:
        raise FileNotFoundError(f"{folder} has neither config.json nor adapter_config.json: it is no saved model")
    index = folder / f"{stem}.safetensors.index.json"
    if index.name in contents:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if missing := [name for name in shards if name not in contents]:
            raise FileNotFoundError(
                f"{index} names {len(shards)} files, {len(missing)} of which are missing: {', '.join(missing)}"
            )
    elif f"{stem}.safetensors" not in contents:
        raise FileNotFoundError(f"{folder} has no {stem}.safetensors: save the model there, by model.save_pretrained")


def find_code(folder: Path) -> list[str]:
    """
    The code files that loading a folder runs: those that an `auto_map` names, and what they import of their siblings.

    Raises:
        FileNotFoundError: If one is missing.
    """
    needed: dict[str, str] = {}  # by what it is needed
    for name in ("config.json", "processor_config.json"):
        if (folder / name).is_file():
            for entry in json.loads((folder / name).read_text()).get("auto_map", {}).values():
                needed[entry.split(".")[0]] = name
    found: set[str] = set()
    while new := set(needed) - found:
        for module in new:
            path = folder / f"{module}.py"
            if not path.is_file():
                raise FileNotFoundError(f"{path}, which {needed[module]} names, is missing: save the model once more")
            for sibling in re.findall(r"^\s*from \.(\w+) import", path.read_text(), flags=re.MULTILINE):
                needed.setdefault(sibling, path.name)
        found |= new
    return sorted(f"{module}.py" for module in found)


def _name_base(path: Path, base_model: str | None) -> tuple[bytes, str]:
    """An adapter's configuration with a base that others can load, and that base."""
    config = json.loads(path.read_text())
    base = base_model or config["base_model_name_or_path"]
    if not is_hub_id(base):
        raise ValueError(
            f"{path} names the base {base!r}, which only this machine has: publish the base first and give its"
            " id by --base-model"
        )
    return json.dumps({**config, "base_model_name_or_path": base}, indent=2).encode(), base


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a Hub id, and is no folder here."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not Path(name).exists()


def write_card(folder: Path, publication: Publication) -> str:
    """The folder's model card, or a short one, with the code that is run, and without bases that are folders."""
    path = folder / "README.md"
    text = path.read_text() if path.is_file() else f"# {folder.resolve().name}\n"
    front, body = {}, text
    if match := re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL):
        front, body = yaml.safe_load(match.group(1)) or {}, text[match.end() :]
    front = {
        "library_name": "peft" if publication.base_model else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["visualchat"],
        **front,
    }
    bases = front.pop("base_model", [])
    bases = [one for one in ([bases] if isinstance(bases, str) else bases) if is_hub_id(one)]
    if publication.base_model:
        bases = [publication.base_model]
    if bases:
        front["base_model"] = bases
    for picture in re.findall(r"!\[[^\]]*\]\(([^):]+)\)", body):
        if picture not in publication.contents:
            raise FileNotFoundError(f"{path} shows {picture}, which is not in {folder}")
    table = ["| file | bytes | SHA-256 |", "|---|---|---|"]
    table += [f"| `{name}` | {size:,} | `{digest}` |" for name, size, digest in map(publication.measure, publication.code)]
    section = CODE_SECTION.format(
        begin=CODE_BEGIN,
        end=CODE_END,
        table="\n".join(table),
        exceptions="; ".join(f"{who} ({what})" for who, what in EXCEPTIONS.items()),
    )
    body = re.sub(f"\n*<!-- code: written by [^>]*-->.*?{re.escape(CODE_END)}\n", "", body, flags=re.DOTALL)
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n{body.rstrip()}\n\n{section}"


def check_access(token: str | None = None) -> HfApi:
    """
    The Hub, once it has accepted the token: `token`, else `HF_TOKEN`, else that of `hf auth login`.

    Raises:
        ConnectionError: If the Hub cannot be reached.
        PermissionError: If there is no token, or the Hub refuses it.
    """
    api = HfApi(token=token)
    try:
        api.whoami()
    except LocalTokenNotFoundError:
        raise PermissionError(
            f"There is no access token for {api.endpoint}: log in by `hf auth login`, or set HF_TOKEN"
        ) from None
    except HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        raise PermissionError(
            f"{api.endpoint} refuses the access token: make one with the right to write at {api.endpoint}/settings/tokens,"
            " and give it by `hf auth login` or HF_TOKEN"
        ) from None
    except Exception as error:  # whatever the network library of the day raises
        raise ConnectionError(f"{api.endpoint} cannot be reached: {error}") from error
    return api


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    base_model: str | None = None,
) -> CommitInfo:
    """
    Publishes a folder in one commit. Weights and code of earlier commits that the folder does not have are removed.

    Args:
        folder (`Path`): See [`collect`].
        repo_id (`str`): `"user/name"`. The repository is created if it does not exist.
        private (`bool`, *optional*): Of a repository that is created.
        revision (`str`, *optional*): A branch, created if it does not exist. Defaults to `"main"`.
        token (`str`, *optional*): Defaults to `HF_TOKEN` or that of `hf auth login`.
        base_model (`str`, *optional*): See [`collect`].

    Raises:
        ConnectionError: If the Hub cannot be reached, or the upload broke off. The same call goes on with it.
        PermissionError: If the Hub refuses the token, or the token may not write there.
        ValueError: If an adapter's base is not on the Hub; see also [`collect`].
    """
    publication = collect(folder, base_model, token)
    api = check_access(token)
    if publication.base_model and not api.repo_exists(publication.base_model):
        raise ValueError(
            f"{folder / 'adapter_config.json'} names the base {publication.base_model!r}, which is not at {api.endpoint}:"
            " publish the base first and give its id by --base-model"
        )
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision not in (None, "main"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=revision)
        operations = [CommitOperationAdd(name, content) for name, content in publication.contents.items()]
        operations += [
            CommitOperationDelete(name)
            for name in there
            if REPLACED.fullmatch(name) and "/" not in name and name not in publication.contents
        ]
        return api.create_commit(repo_id, operations, commit_message=f"Publish {folder.resolve().name}", revision=revision)
    except HfHubHTTPError as error:
        if error.response.status_code != 403:
            raise
        raise PermissionError(
            f"The access token may not write to {repo_id} at {api.endpoint}: choose another name, or a token with"
            " the right to write"
        ) from None
    except (RuntimeError, OSError) as error:
        cause = error.__cause__ or error
        raise ConnectionError(
            f"The upload to {repo_id} broke off: {error} ({type(cause).__name__}: {cause}). Run the command again to resume"
        ) from error


def run(args: argparse.Namespace) -> None:
    """Uploads with the options of `visualchat push`."""
    try:
        if args.dry_run:
            print(collect(args.model, args.base_model, args.token).describe())
            return
        commit = push(
            args.model,
            args.repository,
            private=args.private,
            revision=args.revision,
            token=args.token,
            base_model=args.base_model,
        )
    except (OSError, ValueError) as error:  # PermissionError, ConnectionError and FileNotFoundError among them
        raise SystemExit(f"error: {error}") from error
    print(f'{commit.commit_url}\nfrom_pretrained("{args.repository}", trust_remote_code=True, revision="{commit.oid}")')
