"""Uploads a VisualChat folder, or a PEFT adapter of one, to the Hugging Face Hub: `visualchat push`."""

import argparse
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from visualchat.errors import input_errors
from visualchat.hub.secret_scan import Finding, find_secrets, read_text_of


# The files of a folder (not of its subfolders) that are uploaded. Pickles are not: `training_args.bin` may hold a token.
PUBLISHED = re.compile(
    r".+\.(safetensors|json|jinja|py|model|png|jpe?g)|README\.md|(LICEN[CS]E|NOTICE|USE_POLICY)(\.(md|txt))?|(merges|vocab)\.txt"
)
RUN_STATE = ("trainer_state.json",)
# Files of an earlier push, which are deleted if the folder does not have them
DELETED_IF_MISSING = re.compile(r".+\.(safetensors(\.index\.json)?|py)")
CODE_BEGIN, CODE_END = "<!-- code: written by visualchat push -->", "<!-- end of code -->"
# Calls of the travelling code that use files or the network, and for what. tests/hub/test_traveling_code.py checks them
EXCEPTIONS = {
    "`ImageMemory.save`, `ImageMemoryStore` with a `folder` (`ImageMemoryFolder`)": "write and delete image memory files",
    "`ChatSession.save`": "writes a conversation and its images, and removes those of an earlier one",
    "`load_image` of a URL, also through the processor or a chat": "downloads an image",
    "`save_pretrained`, `push_to_hub`": "as in transformers",
}
CODE_SECTION = """\
{begin}
## What `trust_remote_code=True` runs

{table}

Loading, `forward` and `generate` open no connection, start no process and write no file, except for transformers' own cache.
Only these calls do: {exceptions}. Pass `revision="<commit>"` to run exactly these files.
{end}
"""


@dataclass(frozen=True)
class Publication:
    """
    What a push uploads.

    Args:
        contents (`dict[str, Path | bytes]`): The files to upload, or their contents, by their names in the repository.
        left_out (`list[str]`): The names in the folder that are not uploaded.
        code (`list[str]`): The names of the code files among `contents`.
        base_model (`str`, *optional*): The Hub id of an adapter's base model.
    """

    contents: dict[str, Path | bytes]
    left_out: list[str]
    code: list[str]
    base_model: str | None

    def describe(self) -> str:
        """A line for every file with its size in bytes and its SHA-256, and a line for every file that is left out."""
        lines = [f"{size:>15,}  {digest}  {name}" for name, size, digest in map(self.measure, sorted(self.contents))]
        return "\n".join([*lines, *(f"{'left out':>15}  {name}" for name in self.left_out)])

    def measure(self, name: str) -> tuple[str, int, str]:
        """The name, size in bytes and SHA-256 of one file."""
        content = self.contents[name]
        if isinstance(content, bytes):
            return name, len(content), hashlib.sha256(content).hexdigest()
        digest = hashlib.sha256()
        with content.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
        return name, content.stat().st_size, digest.hexdigest()


def collect_files(folder: Path, base_model: str | None = None, token: str | None = None) -> Publication:
    """
    Checks that a folder has all files that others need to load it, and collects them. Nothing in the folder changes.

    Args:
        folder (`Path`): A saved model or adapter, with its processor.
        base_model (`str`, *optional*): The Hub id of an adapter's base model, if the adapter names a local folder.
        token (`str`, *optional*): The access token, to check that no file contains it.

    Raises:
        FileNotFoundError, ValueError: If a file is missing or wrong, is a link, or holds what looks like a secret. The error
            names the file and says what to do.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}")
    _refuse_links(folder)
    contents: dict[str, Path | bytes] = {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and PUBLISHED.fullmatch(path.name) and path.name not in RUN_STATE
    }
    is_adapter = "adapter_config.json" in contents
    _check_weights(folder, contents, "adapter_model" if is_adapter else "model")
    for name in ("processor_config.json", "chat_template.jinja", "tokenizer_config.json"):
        if name not in contents:
            raise FileNotFoundError(f"{folder} has no {name}: save the processor there with processor.save_pretrained")
    code = find_code(folder)
    for name in [name for name in contents if name.endswith(".py") and name not in code]:
        del contents[name]  # no other file imports it
    if is_adapter:
        contents["adapter_config.json"], base_model = _set_base_model(folder / "adapter_config.json", base_model)
    contents["README.md"] = b""  # so that it does not count as left out
    publication = Publication(
        contents=contents,
        left_out=sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if path.name not in contents),
        code=code,
        base_model=base_model if is_adapter else None,
    )
    contents["README.md"] = make_card(folder, publication).encode()
    secrets: list[Finding] = []
    for name, content in contents.items():
        # As the folder has it: what is sent in its place, such as the card, has other lines
        data = read_text_of(folder / name) if (folder / name).is_file() else content
        secrets += find_secrets(name, data, token)
    if secrets:
        raise ValueError(
            f"{folder}{os.sep}{'; '.join(map(str, secrets))}: remove what is secret, and revoke it if it was shared"
        )
    return publication


def _refuse_links(folder: Path) -> None:
    """
    A link may lead to a file that nobody meant to publish. Those of the Hub's own cache, from a snapshot to its blobs, are
    files of the model.
    """
    here = folder.resolve()
    for path in sorted(folder.iterdir()):
        target = path.resolve()
        is_cached = here.parent.name == "snapshots" and target.parent == here.parents[1] / "blobs"
        if path.is_symlink() and PUBLISHED.fullmatch(path.name) and not is_cached:
            raise ValueError(f"{path} is a link to {target}, and links are not sent: put the file itself there")


def _check_weights(folder: Path, contents: dict[str, Path | bytes], stem: str) -> None:
    config = "adapter_config.json" if stem == "adapter_model" else "config.json"
    if config not in contents:
        raise FileNotFoundError(f"{folder} has neither config.json nor adapter_config.json: it is not a saved model")
    index = folder / f"{stem}.safetensors.index.json"
    if index.name in contents:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if missing := [name for name in shards if name not in contents]:
            raise FileNotFoundError(
                f"{index} names {len(shards)} files, {len(missing)} of which are missing: {', '.join(missing)}"
            )
    elif f"{stem}.safetensors" not in contents:
        raise FileNotFoundError(f"{folder} has no {stem}.safetensors: save the model there with model.save_pretrained")


def find_code(folder: Path) -> list[str]:
    """
    The code files that run when the folder is loaded: the files that an `auto_map` names, and those that they import.

    Raises:
        FileNotFoundError: If one of them is missing.
    """
    needed: dict[str, str] = {}  # module name: the file that needs it
    for name in ("config.json", "processor_config.json"):
        if (folder / name).is_file():
            for entry in json.loads((folder / name).read_text()).get("auto_map", {}).values():
                needed[entry.split(".")[0]] = name
    found: set[str] = set()
    while new := set(needed) - found:
        for module in new:
            path = folder / f"{module}.py"
            if not path.is_file():
                raise FileNotFoundError(f"{path}, which {needed[module]} names, is missing: save the model again")
            for sibling in re.findall(r"^\s*from \.(\w+) import", path.read_text(), flags=re.MULTILINE):
                needed.setdefault(sibling, path.name)
        found |= new
    return sorted(f"{module}.py" for module in found)


def _set_base_model(path: Path, base_model: str | None) -> tuple[bytes, str]:
    """An adapter's configuration with a base model that is on the Hub, and the id of that base model."""
    config = json.loads(path.read_text())
    base = base_model or config["base_model_name_or_path"]
    if not is_hub_id(base):
        raise ValueError(
            f"{path} names the base model {base!r}, which exists on this machine only: push the base model first"
            " and pass its id with --base-model"
        )
    return json.dumps({**config, "base_model_name_or_path": base}, indent=2).encode(), base


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a Hub id and is not a local folder."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not Path(name).exists()


def make_card(folder: Path, publication: Publication) -> str:
    """The folder's model card (or a short new one) with a section on its code, and without local folders as base models."""
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
    for image in re.findall(r"!\[[^\]]*\]\(([^):]+)\)", body):
        if image not in publication.contents:
            raise FileNotFoundError(f"{path} shows the image {image}, which is not in {folder}")
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
    Connects to the Hub with `token`, else `HF_TOKEN`, else the token of `hf auth login`, and checks that it is valid.

    Raises:
        ConnectionError: If the Hub cannot be reached.
        PermissionError: If there is no token, or the Hub rejects it.
    """
    api = HfApi(token=token)
    try:
        api.whoami()
    except LocalTokenNotFoundError:
        raise PermissionError(
            f"There is no access token for {api.endpoint}: log in with `hf auth login`, or set HF_TOKEN"
        ) from None
    except HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        raise PermissionError(
            f"{api.endpoint} rejects the access token: create one with write access at {api.endpoint}/settings/tokens,"
            " and log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except Exception as error:  # the type depends on the HTTP library that huggingface_hub uses
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
    Uploads a folder in one commit. Weights and code files in the repository that are not in the folder are deleted.

    Args:
        folder (`Path`): See [`collect_files`].
        repo_id (`str`): `"user/name"`. The repository is created if it does not exist.
        private (`bool`, *optional*): Whether the repository is private, if it is created.
        revision (`str`, *optional*): A branch, created if it does not exist. Defaults to `"main"`.
        token (`str`, *optional*): The access token. Defaults to `HF_TOKEN`, else the token of `hf auth login`.
        base_model (`str`, *optional*): See [`collect_files`].

    Raises:
        ConnectionError: If the Hub cannot be reached, or the upload was interrupted. The same call resumes the upload.
        PermissionError: If the Hub rejects the token, or the token has no write access to the repository.
        ValueError: If an adapter's base model is not on the Hub; see also [`collect_files`].
    """
    publication = collect_files(folder, base_model, token)
    api = check_access(token)
    if publication.base_model and not api.repo_exists(publication.base_model):
        raise ValueError(
            f"{folder / 'adapter_config.json'} names the base model {publication.base_model!r}, not found at {api.endpoint}:"
            " push the base model first and pass its id with --base-model"
        )
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision not in (None, "main"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        remote_files = api.list_repo_files(repo_id, revision=revision)
        operations = [CommitOperationAdd(name, content) for name, content in publication.contents.items()]
        operations += [
            CommitOperationDelete(name)
            for name in remote_files
            if DELETED_IF_MISSING.fullmatch(name) and "/" not in name and name not in publication.contents
        ]
        return api.create_commit(repo_id, operations, commit_message=f"Publish {folder.resolve().name}", revision=revision)
    except HfHubHTTPError as error:
        if error.response.status_code != 403:
            raise
        raise PermissionError(
            f"The access token has no write access to {repo_id} at {api.endpoint}: choose another name, or a token"
            " with write access"
        ) from None
    except (RuntimeError, OSError) as error:
        cause = error.__cause__ or error
        raise ConnectionError(
            f"The upload to {repo_id} was interrupted: {error} ({type(cause).__name__}: {cause})."
            " Run the command again to resume it"
        ) from error


def run(args: argparse.Namespace) -> None:
    """Runs `visualchat push` with these options."""
    with input_errors():  # includes PermissionError, ConnectionError and FileNotFoundError
        if args.dry_run:
            print(collect_files(args.model, args.base_model, args.token).describe())
            return
        commit = push(
            args.model,
            args.repository,
            private=args.private,
            revision=args.revision,
            token=args.token,
            base_model=args.base_model,
        )
    print(f'{commit.commit_url}\nfrom_pretrained("{args.repository}", trust_remote_code=True, revision="{commit.oid}")')
