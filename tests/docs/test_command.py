"""The command `visualchat`: help, exit statuses, whose code runs, and the wheel that brings it."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from helpers.tiny import make_model, make_processor
from visualchat import cli
from visualchat.cli import chat


ROOT = next(parent for parent in Path(__file__).parents if (parent / "setup.cfg").exists())
HEAVY = {"accelerate", "datasets", "deepspeed", "fastapi", "gradio", "matplotlib", "peft", "torch", "transformers"}


def run_python(*words, **settings) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved model and processor, with their code."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    make_model(image_number_keys=True).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def fork(folder, tmp_path, monkeypatch) -> Path:
    """A model of another type, whose code leaves a file `ran` when it is imported."""
    fork = shutil.copytree(folder, tmp_path / "fork")
    config = json.loads((fork / "config.json").read_text())
    (fork / "config.json").write_text(json.dumps({**config, "model_type": "visualchat_fork"}))
    code = fork / "configuration_visualchat.py"
    code.write_text(
        code.read_text().replace('model_type = "visualchat"', 'model_type = "visualchat_fork"')
        + f"\n\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n"
    )
    assert "visualchat_fork" in code.read_text()
    # Code of another test, which transformers has imported, is forgotten
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return fork


class TestHelp:
    def test_of_every_command_imports_nothing_heavy(self):
        script = """
import contextlib, io, json, sys
from visualchat.cli import COMMANDS, main
shown = {}
for name in COMMANDS:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            status = main([*name.split(), "--help"])
        except SystemExit as stop:
            status = stop.code
    shown[name] = output.getvalue(), status
print(json.dumps([shown, sorted(sys.modules)]))
"""
        done = run_python("-c", script)
        shown, modules = json.loads(done.stdout)
        assert HEAVY.isdisjoint(modules)
        for name, (text, status) in shown.items():
            assert text.startswith(f"usage: visualchat {name} ") and status == 0

    def test_lists_every_command_and_its_module(self, capsys):
        assert cli.main(["--help"]) == 0
        shown = capsys.readouterr().out
        assert all(f"  {name} " in shown for name in cli.COMMANDS)
        modules = {path.stem for path in Path(cli.__file__).parent.glob("*.py")} - {"__init__", "options"}
        assert {name.replace(" ", "_") for name in cli.COMMANDS} == modules

    def test_of_train_names_every_field(self, capsys):
        from dataclasses import fields

        from transformers import TrainingArguments

        from visualchat.training.arguments import DataArguments, ModelArguments
        from visualchat.training.trainer import VisualChatTrainingArguments

        cli.main(["train", "--help"])
        shown = capsys.readouterr().out
        ours = {one.name for kind in (ModelArguments, DataArguments, VisualChatTrainingArguments) for one in fields(kind)}
        for name in ours - {one.name for one in fields(TrainingArguments)}:
            assert f"--{name} " in shown, name

    def test_version(self, capsys):
        assert cli.main(["--version"]) == 0
        assert re.match(r"visualchat \d+\.\d+\.\d+ \(transformers \d.*, torch \d.*, Python \d", capsys.readouterr().out)

    @pytest.mark.parametrize("words", [[], ["fine-tune"], ["convert"], ["--verbose"]], ids=" ".join)
    def test_what_is_no_command_is_refused(self, words, capsys):
        assert cli.main(words) == 2
        shown = capsys.readouterr()
        assert "command" in shown.err and "convert released" in shown.err and not shown.out


class TestChoicesAreThoseOfTheWork:
    """Help imports no work, so that some names are written twice."""

    def test_examples_of_the_web_page(self):
        from visualchat.chat.page_conversation import EXAMPLES

        assert list(choices("web", "examples")) == list(EXAMPLES)

    def test_dtypes_and_modes_of_a_plan(self):
        from typing import get_args, get_type_hints

        from visualchat.planning.plan import DTYPES
        from visualchat.training.arguments import ModelArguments

        hints = get_type_hints(ModelArguments)
        assert list(choices("plan", "dtype")) == list(DTYPES)
        for name in ("mode", "lora_target"):
            assert set(choices("plan", name)) == set(get_args(hints[name]))

    def test_attentions_and_projectors(self):
        from modeling_visualchat import configuration_visualchat

        source = Path(configuration_visualchat.__file__).read_text()
        names = [*choices("convert_llava", "attention"), *choices("convert_llava", "projector")]
        assert all(f'"{name}"' in source for name in [*names, *choices("convert_released", "attention")])


def choices(command: str, name: str) -> list[str]:
    """What an option of a command takes."""
    import argparse
    import importlib

    found = []

    def keep(self, *args, **kwargs):
        found.extend(action.choices for action in self._actions if action.dest == name)
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(argparse.ArgumentParser, "parse_args", keep)
        importlib.import_module(f"visualchat.cli.{command}").parse_arguments([])
    return found[0]


class TestBadInput:
    """A message that begins with the command, and status 2. In-process: a traceback would be an exception here."""

    @pytest.mark.parametrize(
        "words, message",
        [
            ("chat NOTHING", "there is no folder NOTHING"),
            ("web NOTHING", "there is no folder NOTHING"),
            ("serve NOTHING", "there is no folder NOTHING"),
            ("evaluate NOTHING --conversations CONVERSATIONS", "there is no folder NOTHING"),
            ("merge NOTHING --output OUT", "there is no folder NOTHING"),
            ("merge MODEL --output OUT", "adapter_config.json"),
            ("push NOTHING user/name --dry-run", "no folder NOTHING"),
            ("convert llava NOTHING --output OUT", "there is no folder NOTHING"),
            ("convert llava MODEL --output OUT", "of the type 'visualchat', not 'llava'"),
            ("convert released NOTHING --config NOTHING --output OUT", "NOTHING"),
            ("prepare --dataset NOTHING --check", "NOTHING"),
            ("serve MODEL --device quantum", "there is no device 'quantum'"),
            ("chat PLAIN", "has no processor_config.json"),
            ("serve PLAIN", "has no processor_config.json"),
            ("train NOTHING.yaml", "NOTHING.yaml"),
            ("train LIST.yaml", "must hold fields and their values"),
            ("train BROKEN.yaml", "is no YAML file"),
            ("train UNKNOWN.yaml", "unknown fields colour"),
            ("train --colour red", "unknown options --colour red"),
            ("train --output_dir OUT --use_cpu", "Give --model_name_or_path"),
            ("train --output_dir OUT --use_cpu --model_name_or_path NOTHING", "there is no folder NOTHING"),
            ("train --output_dir OUT --use_cpu --model_name_or_path MODEL", "give --datasets"),
            ("train --output_dir OUT --use_cpu --model_name_or_path MODEL --datasets NOTHING.parquet", "there is no data"),
            ("train --output_dir OUT --use_cpu --vision_name_or_path NOTHING --text_name_or_path X", "no folder NOTHING"),
            ("train --output_dir OUT --use_cpu --model_name_or_path MODEL --streaming", "needs max_steps"),
        ],
    )
    def test_is_told_without_a_traceback(self, words, message, folder, tmp_path, capsys):
        plain = tmp_path / "plain"
        make_model().save_pretrained(plain)
        (tmp_path / "list.yaml").write_text("- mode\n")
        (tmp_path / "broken.yaml").write_text("mode: [")
        (tmp_path / "unknown.yaml").write_text("colour: red\n")
        (tmp_path / "conversations.json").write_text('{"one": [["Which digit?"]]}')
        names = {
            "NOTHING": tmp_path / "deeper/nothing",
            "MODEL": folder,
            "PLAIN": plain,
            "OUT": tmp_path / "out",
            "LIST": tmp_path / "list",
            "BROKEN": tmp_path / "broken",
            "UNKNOWN": tmp_path / "unknown",
            "CONVERSATIONS": tmp_path / "conversations.json",
        }
        for name, path in names.items():
            words, message = words.replace(name, str(path)), message.replace(name, str(path))
        assert cli.main(words.split()) == 2
        shown = capsys.readouterr().err
        command = next(name for name in cli.COMMANDS if words.startswith(name))
        assert f"visualchat {command}: " in shown and message in shown

    @pytest.mark.parametrize(
        "words",
        ["web x --max-images 0", "web x --max-image-mb -1", "web x --image-memory-gb nan", "serve x --port 70000"]
        + ["serve x --dtype float8", "chat x --temperature -0.5", "chat x --num-beams 0", "plan x --gpus 0"],
    )
    def test_options_are_checked(self, words, capsys):
        with pytest.raises(SystemExit) as stop:
            cli.main(words.split())
        assert stop.value.code == 2
        assert "error: " in capsys.readouterr().err

    def test_a_missing_extra_is_named(self, folder, tmp_path, monkeypatch, capsys):
        for name in ("visualchat.chat.page", "visualchat.serving.server"):  # imported again
            monkeypatch.delitem(sys.modules, name, raising=False)
        for command, module, extra in (("web", "gradio", "web"), ("serve", "fastapi", "serve"), ("merge", "peft", "train")):
            monkeypatch.setitem(sys.modules, module, None)
            assert cli.main([command, str(folder), *(["--output", str(tmp_path)] if command == "merge" else [])]) == 2
            assert f"visualchat {command} needs {module}: pip install 'visualchat[{extra}]'" in capsys.readouterr().err

    def test_every_such_module_is_of_its_extra(self):
        from configparser import ConfigParser

        setup = ConfigParser()
        setup.read(ROOT / "setup.cfg")
        for module, extra in cli.EXTRAS.items():
            distribution = {"sklearn": "scikit-learn"}.get(module, module)
            assert distribution in setup["options.extras_require"][extra]

    def test_a_fault_of_the_program_keeps_its_traceback(self, monkeypatch):
        monkeypatch.setattr(chat, "main", lambda argv: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cli.main(["chat", "x"])
        monkeypatch.setattr(chat, "main", lambda argv: __import__("no_such_module"))
        with pytest.raises(ModuleNotFoundError):
            cli.main(["chat", "x"])

    def test_ctrl_c(self, monkeypatch, capsys):
        def interrupt(argv):
            raise KeyboardInterrupt

        monkeypatch.setattr(chat, "main", interrupt)
        assert cli.main(["chat", "x"]) == 130
        assert capsys.readouterr().err == "visualchat chat: stopped\n"

    def test_the_file_for_launchers_fails_as_the_command_does(self, tmp_path):
        done = run_python(ROOT / "examples/train.py", "nothing.yaml", cwd=tmp_path)
        assert done.returncode == 2
        assert "visualchat train: " in done.stderr and "Traceback" not in done.stderr


class TestCodeInFolders:
    @pytest.mark.parametrize(
        "words",
        [
            "chat FORK",
            "web FORK",
            "serve FORK",
            "evaluate FORK --conversations CONVERSATIONS",
            "merge ADAPTER --output OUT",
            "plan FORK --gpus 1",
            "train --model_name_or_path FORK --output_dir OUT --use_cpu",
        ],
    )
    def test_of_another_type_is_refused_and_does_not_run(self, words, fork, tmp_path, capsys):
        (tmp_path / "conversations.json").write_text('{"one": [["Which digit?"]]}')
        adapter = tmp_path / "adapter"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(fork), "target_modules": ["q_proj"]})
        )
        names = {"FORK": fork, "ADAPTER": adapter, "OUT": tmp_path / "out"}
        names["CONVERSATIONS"] = tmp_path / "conversations.json"
        for name, path in names.items():
            words = words.replace(name, str(path))
        assert run_to_the_end(words.split()) == 2
        shown = capsys.readouterr().err
        assert "of the type 'visualchat_fork', not 'visualchat'" in shown
        assert "code of its own, which runs only with --trust-remote-code" in shown
        assert not (tmp_path / "ran").exists()

    def test_of_another_type_runs_when_that_is_asked_for(self, fork, tmp_path, monkeypatch, capsys):
        assert ask(fork, monkeypatch, "--trust-remote-code") == 0
        assert (tmp_path / "ran").exists()
        assert capsys.readouterr().out.strip()

    def test_of_our_type_loads_without_running(self, folder, tmp_path, monkeypatch, capsys):
        """The package's classes are taken."""
        copied = shutil.copytree(folder, tmp_path / "copied")
        for code in copied.glob("*.py"):
            code.write_text("raise RuntimeError('the code of the folder runs')\n")
        assert ask(copied, monkeypatch) == 0
        assert capsys.readouterr().out.strip()

    def test_of_a_tokenizer_does_not_run(self, folder, tmp_path, monkeypatch, capsys):
        copied = shutil.copytree(folder, tmp_path / "copied")
        settings = json.loads((copied / "tokenizer_config.json").read_text())
        settings |= {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": [None, "odd.Odd"]}}
        (copied / "tokenizer_config.json").write_text(json.dumps(settings))
        (copied / "odd.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Odd: pass\n")
        assert ask(copied, monkeypatch) in (0, 2)
        assert not (tmp_path / "ran").exists()


def run_to_the_end(words: list[str]) -> int:
    try:
        return cli.main(words)
    except SystemExit as stop:  # argparse's
        return stop.code


def ask(folder: Path, monkeypatch, *options: str) -> int:
    """The exit status of a chat of one question."""
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("Which digit?\n"))
    return cli.main(["chat", str(folder), "--max-new-tokens", "4", *options])


class TestAdapters:
    def test_chat_takes_an_adapter(self, folder, tmp_path, monkeypatch, capsys):
        from peft import LoraConfig, get_peft_model

        from visualchat.loading import load_model

        model = get_peft_model(load_model(str(folder)), LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj"))
        model.save_pretrained(tmp_path / "adapter")
        make_processor().save_pretrained(tmp_path / "adapter")
        assert ask(tmp_path / "adapter", monkeypatch) == 0
        assert capsys.readouterr().out.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built of a copy: the build writes into the source tree."""
    source = tmp_path_factory.mktemp("source")
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.cfg"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    # setuptools comes with the extra `dev`: nothing is downloaded
    done = run_python("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", source / "dist", source)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel


class TestWheel:
    def test_holds_both_packages_the_deepspeed_files_and_the_licence(self, wheel):
        names = set(zipfile.ZipFile(wheel).namelist())
        sources = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
        sources |= {f"visualchat/training/deepspeed/{path.name}" for path in (ROOT / "examples/deepspeed").glob("*.json")}
        assert sources <= names
        assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"modeling_visualchat", "visualchat"}
        assert any(name.endswith("licenses/LICENSE") for name in names)

    def test_runs_where_nothing_else_of_this_repository_is(self, wheel, folder, tmp_path):
        venv.create(tmp_path / "env", with_pip=False, symlinks=True)
        python = tmp_path / "env/bin/python"
        (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        install = ["-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
        run_python(*install, check=True, env=environment)
        # The dependencies alone: a .pth file in a folder that a .pth file names is not read, and so no editable install
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

        def run(*words, **settings) -> str:
            settings = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, **settings}
            done = subprocess.run([*map(str, words)], **settings)
            assert done.returncode == 0, done.stderr[-3000:]
            return done.stdout

        command = tmp_path / "env/bin/visualchat"
        assert "convert released" in run(command, "--help")
        version = run(command, "--version").split()[1]
        assert version in wheel.name
        Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
        assert run(command, "chat", folder, "--image", "image.png", "--max-new-tokens", 4, input="Which digit?\n").strip()
        plan = run(command, "plan", ROOT / "hub_configs/tiny", "--gpus", 2, "--seq-length", 64, "--checkpointing", "off")
        assert "zero3_offload" in plan
        script = (
            "import modeling_visualchat, visualchat\nfrom transformers import AutoModel\n"
            f"print(modeling_visualchat.__file__, visualchat.__file__, type(AutoModel.from_pretrained({str(folder)!r})))"
        )
        ours, tools, kind = run(python, "-c", script).split(" ", 2)
        assert Path(ours).is_relative_to(tmp_path) and Path(tools).is_relative_to(tmp_path)
        assert "modeling_visualchat.modeling_visualchat.VisualChatForCausalLM" in kind
