"""`visualchat push`, `visualchat train` and the stock `Trainer` against a Hub on loopback (`hub_server.py`)."""

import hashlib
import json
import os
import re
import subprocess
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub.errors import HfHubHTTPError
from transformers import Trainer, TrainingArguments

from helpers.commands import command
from helpers.elsewhere import CODE_FILES, run_elsewhere
from helpers.hub_server import TOKEN, HubServer, serve
from helpers.tiny import digit_image, make_inputs, make_model, make_processor
from helpers.training import arguments, save_parts
from visualchat.cli import main as visualchat
from visualchat.hub.push import collect_files, push
from visualchat.training.train import main as train


ROOT = Path(__file__).parents[2]
RUN_FILES = ("training_args.bin", "optimizer.pt", "trainer_state.json")
CARD = """\
---
license: apache-2.0
base_model:
- outputs/joined
- openai/clip-vit-large-patch14
---
# A model

## Measured

| | |
|---|---|
| eval_loss | 0.5 |

![Loss](curves.png)
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub, and this process and those that it starts as its clients, with an empty cache and a valid token."""
    with serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        # What the library has read from the environment when it was imported
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        yield server


def save_model(folder: Path, **settings):
    model = make_model(image_number_keys=True)
    model.save_pretrained(folder, **settings)
    make_processor().save_pretrained(folder)
    return model


def save_run(folder: Path):
    """A folder as a training run leaves it: with a card, a picture, and what stays behind."""
    model = save_model(folder, max_shard_size="200KB")
    (folder / "README.md").write_text(CARD)
    digit_image(0).save(folder / "curves.png")
    for name in RUN_FILES:
        (folder / name).write_text(f"{TOKEN}")
    (folder / "checkpoint-3").mkdir()
    return model


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


class TestDryRun:
    def test_lists_every_file_with_size_and_hash_and_sends_nothing(self, hub: HubServer, tmp_path, capsys, monkeypatch):
        save_run(tmp_path / "model")
        monkeypatch.delenv("HF_TOKEN")
        capsys.readouterr()
        visualchat(["push", str(tmp_path / "model"), "user/name", "--dry-run"])
        assert hub.requests == []
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        sent = {words[2]: words[:2] for words in lines if words[0] != "left"}
        left_out = {words[2] for words in lines if words[0] == "left"}
        assert left_out == {*RUN_FILES, "checkpoint-3/"}
        assert set(sent) == {path.name for path in (tmp_path / "model").iterdir()} - {*RUN_FILES, "checkpoint-3"}
        assert sum(name.endswith(".safetensors") for name in sent) > 1
        for name in set(sent) - {"README.md"}:
            path = tmp_path / "model" / name
            assert sent[name] == [f"{path.stat().st_size:,}", sha256(path)]

    def test_the_card_lists_the_code_with_hashes(self, tmp_path, monkeypatch):
        save_run(tmp_path)
        (tmp_path / "outputs" / "joined").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "unused.py").write_text("")
        publication = collect_files(tmp_path)
        card = publication.contents["README.md"].decode()
        table = dict(re.findall(r"^\| `(\S+\.py)` \| [\d,]+ \| `(\w{64})` \|$", card, flags=re.MULTILINE))
        assert table == {path.name: sha256(path) for path in tmp_path.glob("*.py") if path.name != "unused.py"}
        assert set(table) >= CODE_FILES and "unused.py" in publication.left_out
        assert "| eval_loss | 0.5 |" in card and "![Loss](curves.png)" in card
        front = front_matter(card)
        assert front["license"] == "apache-2.0" and front["library_name"] == "transformers"
        assert front["base_model"] == ["openai/clip-vit-large-patch14"]  # not the folder
        (tmp_path / "README.md").write_text(card)
        assert collect_files(tmp_path).contents["README.md"].decode() == card

    def test_a_hub_config_is_not_a_model(self):
        with pytest.raises(FileNotFoundError, match=r"no model\.safetensors: save the model there"):
            collect_files(ROOT / "hub_configs" / "tiny")

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("config.json", r"neither config\.json nor adapter_config\.json"),
            ("model-00002-of-*.safetensors", r"index\.json names \d files, 1 of which are missing: model-00002"),
            ("chat_template.jinja", r"no chat_template\.jinja: save the processor there"),
            ("tokenizer_config.json", r"no tokenizer_config\.json: save the processor there"),
            ("projector_visualchat.py", r"projector_visualchat\.py, which modeling_visualchat\.py names, is missing"),
            ("curves.png", r"README\.md shows the image curves\.png"),
        ],
    )
    def test_what_is_missing_is_named(self, name, message, tmp_path):
        save_run(tmp_path)
        next(tmp_path.glob(name)).unlink()
        with pytest.raises(FileNotFoundError, match=message):
            collect_files(tmp_path)


class TestPush:
    def test_pushed_and_loaded_in_a_fresh_process_at_a_revision(self, hub: HubServer, tmp_path, monkeypatch):
        """By the command, with the library's debug output, in which the token must not show."""
        model = save_run(tmp_path / "model")
        inputs = make_inputs(["titit", "tt"], model)
        with torch.no_grad():
            torch.save({"inputs": inputs, "logits": model(**inputs).logits}, tmp_path / "expected.pt")
        words = command("push", tmp_path / "model", "user/name", "--private")
        environment = {**os.environ, "HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug"}
        result = subprocess.run(
            [*words, "--revision", "v1"], capture_output=True, text=True, env=environment, timeout=300, check=False
        )
        assert result.returncode == 0, result.stderr[-3000:]
        assert "/preupload/" in result.stderr and TOKEN not in result.stdout + result.stderr
        for path in tmp_path.rglob("*"):
            if path.is_file() and path.name not in RUN_FILES:
                assert TOKEN.encode() not in path.read_bytes(), path

        revision = re.search(r'revision="(\w{40})"', result.stdout).group(1)
        repository = hub.repositories["user/name"]
        assert repository.private and repository.branches["v1"] == revision
        assert hub.files("user/name", "main") == {}
        files = hub.files("user/name", revision)
        assert set(files) == {path.name for path in (tmp_path / "model").iterdir()} - {*RUN_FILES, "checkpoint-3"}
        for name in set(files) - {"README.md"}:
            assert files[name] == (tmp_path / "model" / name).read_bytes()

        hub.repositories["user/name"].commit("v1", {})  # a later commit, which the revision does not see
        run_elsewhere(
            """
            expected = torch.load(root + "/expected.pt")
            model = AutoModel.from_pretrained("user/name", trust_remote_code=True, revision=revision)
            with torch.no_grad():
                assert torch.equal(model(**expected["inputs"]).logits, expected["logits"])
            processor = AutoProcessor.from_pretrained("user/name", trust_remote_code=True, revision=revision)
            question = [{"role": "user", "content": "What?"}]
            chat = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
            model.generate(**processor.apply_chat_template(question, **chat), max_new_tokens=2)
            """,
            cwd=tmp_path,
            root=tmp_path,
            revision=revision,
        )

    def test_an_interrupted_upload_goes_on(self, hub: HubServer, tmp_path, monkeypatch):
        save_run(tmp_path)
        shards = sorted(tmp_path.glob("*.safetensors"))
        hub.broken = {sha256(shards[-1])}
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        with pytest.raises(ConnectionError, match=rf"{shards[-1].name}.*Run the command again to resume"):
            push(tmp_path, "user/name")
        assert hub.files("user/name") == {}
        arrived = set(hub.uploads) - hub.broken
        assert arrived and arrived <= set(hub.blobs)

        hub.broken, hub.uploads = set(), []
        push(tmp_path, "user/name")
        assert sha256(shards[-1]) in hub.uploads and not arrived & set(hub.uploads)
        assert all(hub.files("user/name")[shard.name] == shard.read_bytes() for shard in shards)

    def test_a_later_push_removes_weights_and_code_that_are_gone(self, hub: HubServer, tmp_path):
        save_run(tmp_path / "first")
        save_model(tmp_path / "second")
        push(tmp_path / "first", "user/name")
        commit = push(tmp_path / "second", "user/name")
        files = hub.files("user/name", commit.oid)
        assert [name for name in files if ".safetensors" in name] == ["model.safetensors"]
        assert "curves.png" in files  # neither weights nor code
        hub.uploads = []
        push(tmp_path / "second", "user/name")
        assert hub.uploads == [] and list(hub.repositories["user/name"].commits)[-1] == commit.oid

    @pytest.mark.parametrize("given", ["wrong", "none", "another's name"])
    def test_who_may_not_write_is_told_so(self, given, hub: HubServer, tmp_path, monkeypatch, capsys):
        save_model(tmp_path / "model")
        wrong = "hf_" + "w" * 34
        monkeypatch.setenv("HF_TOKEN", {"wrong": wrong, "none": "", "another's name": TOKEN}[given])
        name = "somebody/name" if given == "another's name" else "user/name"
        assert visualchat(["push", str(tmp_path / "model"), name]) == 2
        message = {
            "wrong": f"{hub.endpoint} rejects the access token: create one with write access",
            "none": f"There is no access token for {hub.endpoint}: log in with `hf auth login`",
            "another's name": f"The access token has no write access to somebody/name at {hub.endpoint}",
        }[given]
        output = "".join(capsys.readouterr())
        assert message in output
        assert wrong not in output and TOKEN not in output
        assert hub.repositories == {} and hub.uploads == []

    def test_a_hub_that_cannot_be_reached_is_named(self, hub: HubServer, tmp_path, monkeypatch):
        save_model(tmp_path)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
            push(tmp_path, "user/name")

    def test_the_server_refuses_what_the_hub_refuses(self, hub: HubServer, tmp_path):
        """Else the tests above would show nothing."""
        api = huggingface_hub.HfApi(token="hf_wrong")
        for call in (
            lambda: api.whoami(),
            lambda: api.create_repo("user/name"),
            lambda: api.model_info("user/name"),
            lambda: api.hf_hub_download("user/name", "config.json", cache_dir=tmp_path),
        ):
            with pytest.raises(HfHubHTTPError) as error:
                call()
            assert error.value.response.status_code == 401
        huggingface_hub.HfApi().create_repo("user/name")
        with pytest.raises(huggingface_hub.errors.RevisionNotFoundError):
            huggingface_hub.HfApi().model_info("user/name", revision="v9")
        with pytest.raises(huggingface_hub.errors.EntryNotFoundError):
            huggingface_hub.hf_hub_download("user/name", "config.json", cache_dir=tmp_path)


class TestTraining:
    def test_train_publishes_a_model_and_then_an_adapter_on_top(self, hub: HubServer, parts, tmp_path, monkeypatch):
        publish = {"push_to_hub": True, "hub_token": TOKEN, "max_steps": 1}
        monkeypatch.delenv("HF_TOKEN")
        train(arguments(parts, tmp_path / "run", hub_model_id="user/base", **publish))
        base = hub.files("user/base")
        assert set(base) >= CODE_FILES | {"model.safetensors", "processor_config.json", "curves.png"}
        assert "training_args.bin" not in base
        card = base["README.md"].decode()
        assert "| eval_loss |" in card and "| source 0 |" in card and "## What `trust_remote_code=True` runs" in card
        assert "base_model" not in front_matter(card)  # a folder
        for path in tmp_path.rglob("*"):
            assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path

        # The adapter's base is the model that was published
        lora = {"mode": "lora", "lora_learning_rate": 1e-2, "eval_fraction": 0}
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        run_elsewhere(
            """
            sys.modules.pop("modeling_visualchat")  # train.py has it
            from visualchat.training.train import main
            main(words.split("\\n"))
            """,
            cwd=tmp_path,
            words="\n".join(
                arguments(parts, tmp_path / "lora", hub_model_id="user/adapter", **{**publish, **lora})
                + ["--model_name_or_path", "user/base"]
            ),
        )
        adapter = hub.files("user/adapter")
        assert json.loads(adapter["adapter_config.json"])["base_model_name_or_path"] == "user/base"
        front = front_matter(adapter["README.md"].decode())
        assert front["base_model"] == ["user/base"] and front["library_name"] == "peft"
        run_elsewhere(
            """
            from peft import PeftConfig, PeftModel
            base = PeftConfig.from_pretrained("user/adapter").base_model_name_or_path
            model = AutoModel.from_pretrained(base, trust_remote_code=True)
            inputs = {"input_ids": torch.tensor([[1, 5, 9, 7]])}
            with torch.no_grad():
                before = model(**inputs).logits
                published = PeftModel.from_pretrained(model, "user/adapter").eval()(**inputs).logits
                model = AutoModel.from_pretrained(base, trust_remote_code=True)
                local = PeftModel.from_pretrained(model, folder).eval()(**inputs).logits
            assert torch.equal(published, local) and not torch.equal(published, before)
            AutoProcessor.from_pretrained("user/adapter", trust_remote_code=True)
            """,
            cwd=tmp_path,
            folder=tmp_path / "lora" / "model",
        )

    def test_an_adapter_of_a_folder_needs_the_id_of_its_base(self, hub: HubServer, tmp_path):
        peft = pytest.importorskip("peft")
        save_model(tmp_path / "model")
        model = make_model(image_number_keys=True)
        model.name_or_path = str(tmp_path / "model")
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
        make_processor().save_pretrained(tmp_path / "adapter")
        with pytest.raises(
            ValueError, match=r"which exists on this machine only: push the base model first .* --base-model"
        ):
            collect_files(tmp_path / "adapter")
        with pytest.raises(ValueError, match="names the base model 'user/base', not found at http://127"):
            push(tmp_path / "adapter", "user/adapter", base_model="user/base")
        assert hub.repositories == {}
        contents = collect_files(tmp_path / "adapter", "user/base").contents
        assert json.loads(contents["adapter_config.json"])["base_model_name_or_path"] == "user/base"
        assert front_matter(contents["README.md"].decode())["base_model"] == ["user/base"]

    def test_what_cannot_be_published_is_refused_before_training(self, hub: HubServer, parts, tmp_path, monkeypatch):
        with pytest.raises(ValueError, match=r"publishes an adapter.*needs model_name_or_path to be a Hub id"):
            train(arguments(parts, tmp_path / "run", push_to_hub=True, mode="lora"))
        with pytest.raises(PermissionError, match="rejects the access token"):
            train(arguments(parts, tmp_path / "run", push_to_hub=True, hub_token="hf_wrong"))
        assert not (tmp_path / "run" / "model").exists()

    def test_the_trainers_own_push(self, hub: HubServer, tmp_path):
        training_args = TrainingArguments(
            str(tmp_path / "run"), hub_model_id="user/trained", report_to="none", use_cpu=True, disable_tqdm=True
        )
        trainer = Trainer(make_model(image_number_keys=True), training_args, processing_class=make_processor())
        trainer.push_to_hub()
        files = hub.files("user/trained")
        assert set(files) >= CODE_FILES | {
            "model.safetensors",
            "config.json",
            "processor_config.json",
            "chat_template.jinja",
        }
        assert all(TOKEN.encode() not in content for content in files.values())
