"""What `visualchat push` looks for before it sends a folder. The secrets are made up, and put together here."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import PngImagePlugin
from safetensors.torch import save_file

from helpers.tiny import digit_image, make_model, make_processor
from visualchat import cli
from visualchat.hub.push import collect_files
from visualchat.hub.secret_scan import KINDS, find_secrets


ROOT = Path(__file__).parents[2]
MIXED = "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8s9T0u1V2w3X4y5Z6"
HEX = "0123456789abcdef" * 4
SECRETS = {
    "an access token of Hugging Face": ["hf_" + MIXED[:34], "x_hf_" + "a" * 34, "api_org_" + MIXED[:34]],
    "an access token of GitHub": [f"gh{kind}_" + MIXED[:36] for kind in "opsur"]
    + ["github_pat_" + MIXED[:22] + "_" + MIXED],
    "an access token of GitLab": ["glpat-" + MIXED[:20]],
    "an access token of Bitbucket or Atlassian": ["ATBB" + MIXED[:32], "ATATT3xFf" + MIXED],
    "an access token of PyPI or npm": ["pypi-AgEIcHlwaS5vcmc" + MIXED, "npm_" + MIXED[:36]],
    "an API key (sk-…)": ["sk-" + MIXED[:48], "sk-proj-" + MIXED + "_-" + MIXED, "sk-ant-api03-" + MIXED],
    "a key of Stripe": ["sk_live_" + MIXED[:24]],
    "an access key of AWS": ["AKIA" + "IOSFODNN7EXAMPLE", "ASIA" + "IOSFODNN7EXAMPLE"],
    "a secret key of AWS": ["aws_secret_access_key = " + MIXED[:40], '"AWS_SECRET_ACCESS_KEY": "' + MIXED[:36] + '/+/+"'],
    "a key of Google": ["AIza" + MIXED[:35], "GOCSPX-" + MIXED[:28], "ya29." + MIXED],
    "a key of Azure": ["AccountName=a;AccountKey=" + MIXED + MIXED[:34] + "==", "abc8Q~" + MIXED[:34]],
    "a signed URL": ["https://a.blob.core.windows.net/b?sv=1&sig=" + MIXED, "https://a.org/b?X-Amz-Signature=" + HEX],
    "an access token of Slack": ["xox" + "b-123456789012-" + MIXED[:24], "xapp" + "-1-A012-" + MIXED[:20]],
    "a webhook of Slack or Discord": ["https://hooks.slack.com/services/T" + "0AB/B0CD/" + MIXED[:24]],
    "a key of Weights & Biases": ["WANDB_API_KEY=" + HEX[:40], "machine api.wandb.ai\n  login user\n  password " + HEX[:40]],
    "a password of a .netrc file": ["machine example.org login me password " + MIXED[:8]],
    "a private key": [
        f"-----BEGIN {kind}PRIVATE KEY-----\n{MIXED}" for kind in ("", "RSA ", "OPENSSH ", "EC ", "ENCRYPTED ")
    ]
    + [
        "-----BEGIN PGP PRIVATE KEY BLOCK-----\n",
        '{"type": "service_account", "private_key": "-----BEGIN PRIVATE KEY-----\\nMII"}',
    ],
    "an authorization header": ["Authorization: Bearer " + MIXED[:30], '{"authorization": "Bearer ' + MIXED[:30] + '"}'],
    "a JSON Web Token": ["eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0." + MIXED[:43]],
    "a password in a URL": ["https://me:" + "hunter2@example.org/a", "postgres://me:" + "s3cret!@10.0.0.1:5432/db"],
}
HARMLESS = [
    *("task-" + "a" * 40, "the `hf_` prefix of a token", "hf_transfer, hf_xet and hf_hub_download_with_a_long_name"),
    *(
        "sk-estimator-doc-link",
        "ghp_",
        "https://huggingface.co/user/name@main",
        "http://127.0.0.1:8000/v1",
        "git@github.com:a/b",
    ),
    *(
        "https://user:<password>@host",
        "https://user:${PASSWORD}@host",
        "https://{user}:{password}@host",
        "https://u:***@host",
    ),
    *("machine learning", "wandb: run 0123456789abcdef0123456789abcdef01234567", "-----BEGIN CERTIFICATE-----"),
    *(HEX, "sha256:" + HEX, "Authorization: Bearer $HF_TOKEN", "-H 'Authorization: Bearer <token>'", "AKIA", "AIza", "eyJ"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    make_model(image_number_keys=True).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


class TestScan:
    def test_every_kind_has_secrets_here(self):
        assert list(SECRETS) == list(KINDS)

    @pytest.mark.parametrize(("kind", "secret"), [(kind, secret) for kind, some in SECRETS.items() for secret in some])
    def test_a_secret_is_found_in_text_in_json_and_between_bytes(self, kind, secret):
        text = f"first line\n{secret}\nlast line"
        (finding, *others) = [one for one in find_secrets("name", text.encode()) if one.kind == kind]
        assert not others and finding.line == 2 and str(finding) == f"name contains {kind} (line 2)"
        for content in (json.dumps({"a": secret}).encode(), b"\x89\x00" + secret.encode() + b"\x00\xff"):
            assert kind in [one.kind for one in find_secrets("name", content)]

    @pytest.mark.parametrize("text", HARMLESS)
    def test_what_is_none_is_let_pass(self, text):
        assert find_secrets("name", text.encode()) == []

    def test_the_files_of_this_repository_are_let_pass(self):
        """Cards, templates, configurations, a tokenizer, code, images, documents."""
        for name in ("hub_configs", "docs", "src", "examples"):
            for path in (ROOT / name).rglob("*"):
                if path.is_file() and "__pycache__" not in path.parts:
                    assert find_secrets(path.name, path.read_bytes()) == [], path

    def test_random_base64_and_bytes_are_let_pass(self):
        import base64

        noise = bytes(torch.randint(0, 256, (2**20,), generator=torch.Generator().manual_seed(0)).tolist())
        assert find_secrets("name", noise) == find_secrets("name", base64.b64encode(noise)) == []


class TestPush:
    def refuse(self, folder: Path, message: str, capsys, *secrets: str) -> None:
        capsys.readouterr()
        assert cli.main(["push", str(folder), "user/name", "--dry-run"]) == 2
        shown = "".join(capsys.readouterr())
        assert message in shown and not any(secret in shown for secret in secrets)

    def test_a_model_is_let_pass(self, folder):
        assert "model.safetensors" in collect_files(folder).contents

    def test_files_of_each_format(self, folder, capsys):
        secret, other = "hf_" + MIXED[:34], "gh" + "p_" + MIXED[:36]
        kind = "an access token of Hugging Face"
        (folder / "settings.json").write_text(json.dumps({"token": secret}))
        self.refuse(folder, f"{folder / 'settings.json'} contains {kind} (line 1): remove", capsys, secret)
        (folder / "README.md").write_text(f"# Model\n\n{other}\n")
        both = f"README.md contains an access token of GitHub (line 3); settings.json contains {kind} (line 1)"
        self.refuse(folder, both, capsys, secret, other)
        (folder / "settings.json").unlink()
        (folder / "README.md").unlink()
        save_file({"a": torch.zeros(2)}, folder / "extra.safetensors", {"note": secret})
        self.refuse(folder, f"extra.safetensors contains {kind}", capsys, secret)
        (folder / "extra.safetensors").unlink()
        notes = PngImagePlugin.PngInfo()
        notes.add_text("Comment", secret)
        digit_image(0).save(folder / "image.png", pnginfo=notes)
        self.refuse(folder, f"image.png contains {kind}", capsys, secret)
        (folder / "image.png").unlink()
        with (folder / "projector_visualchat.py").open("a") as file:
            file.write(f"# {secret}\n")
        self.refuse(folder, f"projector_visualchat.py contains {kind}", capsys, secret)

    def test_the_token_for_publishing_whatever_its_form(self, folder):
        (folder / "settings.json").write_text('{"token": "another-hubs-token"}')
        with pytest.raises(ValueError, match=r"settings\.json contains an access token \(line 1\)") as error:
            collect_files(folder, token="another-hubs-token")
        assert "another-hubs-token" not in str(error.value)
        assert collect_files(folder)

    def test_links(self, folder, tmp_path, capsys):
        elsewhere = tmp_path / "private.json"
        elsewhere.write_text("{}")
        (folder / "notes.json").symlink_to(elsewhere)
        self.refuse(folder, f"{folder / 'notes.json'} is a link to {elsewhere}, and links are not sent", capsys)
        (folder / "notes.json").unlink()
        (folder / "notes.json").symlink_to(folder / "config.json")
        self.refuse(folder, "notes.json is a link", capsys)
        (folder / "notes.json").unlink()
        (folder / "checkpoint").symlink_to(tmp_path)  # is left out anyway
        (tmp_path / "latest").symlink_to(folder)
        assert "checkpoint/" in collect_files(tmp_path / "latest").left_out

    def test_a_snapshot_of_the_hubs_cache(self, folder, tmp_path, capsys):
        repository = tmp_path / "models--user--name"
        snapshot = repository / "snapshots" / HEX[:40]
        snapshot.mkdir(parents=True)
        (repository / "blobs").mkdir()
        for number, path in enumerate(sorted(folder.iterdir())):
            path.rename(repository / "blobs" / str(number))
            (snapshot / path.name).symlink_to(os.path.join("..", "..", "blobs", str(number)))
        assert "model.safetensors" in collect_files(snapshot).contents
        (snapshot / "notes.json").symlink_to(ROOT / "hub_configs" / "tiny" / "config.json")
        self.refuse(snapshot, "notes.json is a link", capsys)
