"""Model folders with missing or damaged files: the commands and `start_chat` refuse them in one line that names the file."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, CLIPVisionModel, LlamaForCausalLM

from helpers.tiny import TOKENS_PER_IMAGE, make_model, make_processor
from helpers.training import arguments, save_parts
from helpers.versions import needs_transformers
from modeling_visualchat import VisualChatForCausalLM
from modeling_visualchat.weight_checks_visualchat import find_not_finite
from modeling_visualchat.weight_fingerprint_visualchat import ModelWeights
from visualchat import cli
from visualchat.loading import load_model, load_processor


WEIGHT = "model.language_model.layers.1.mlp.up_proj.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The folder `whole`, and `shards` with the same weights in several files."""
    root = tmp_path_factory.mktemp("saved")
    for name, settings in (("whole", {}), ("shards", {"max_shard_size": "200KB"})):
        make_model(image_number_keys=True).save_pretrained(root / name, **settings)
        make_processor().save_pretrained(root / name)
    return root


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return shutil.copytree(saved / "whole", tmp_path / "model")


def change_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def change_fields(path: Path, *fields: str, value) -> None:
    content = json.loads(path.read_text())
    section = content
    for field in fields[:-1]:
        section = section[field]
    section[fields[-1]] = value
    path.write_text(json.dumps(content))


def assert_refused(folder: Path, message: str, capsys) -> None:
    """By a command, in one line, with exit status 2."""
    capsys.readouterr()
    assert cli.main(["chat", str(folder)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"visualchat chat: cannot chat with {folder}: ") and message in last


TENSORS = {
    "one missing": (lambda tensors: tensors.pop(WEIGHT), f"model.safetensors: the tensor {WEIGHT} is missing"),
    "half missing": (
        lambda tensors: [tensors.pop(name) for name in sorted(tensors)[::2]],
        "is missing; 37 of 73 tensors are wrong",
    ),
    "NaN": (
        lambda tensors: tensors[WEIGHT].view(-1)[5:6].fill_(torch.nan),
        f"model.safetensors: the tensor {WEIGHT} holds NaN or infinity",
    ),
    "infinity": (
        lambda tensors: tensors["lm_head.weight"].view(-1)[-1:].fill_(-torch.inf),
        "model.safetensors: the tensor lm_head.weight holds NaN or infinity",
    ),
    "another shape": (
        lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT][:5].contiguous()}),
        f"model.safetensors: the tensor {WEIGHT} has the shape (5, 64), but config.json needs (96, 64)",
    ),
}


class TestWeights:
    @pytest.mark.parametrize("kind", TENSORS)
    def test_tensors(self, kind, folder, capsys):
        change, message = TENSORS[kind]
        change_tensors(folder / "model.safetensors", change)
        assert_refused(folder, message, capsys)
        if kind == "another shape":  # transformers refuses it too, unless it is told not to
            model = AutoModel.from_pretrained(folder, ignore_mismatched_sizes=True)
            message = rf"model\.safetensors: the tensor {WEIGHT} has the shape \(5, 64\)"
        else:
            model, message = AutoModel.from_pretrained(folder), r"model\.safetensors: the tensor .* (missing|holds NaN)"
        with pytest.raises(ValueError, match=message):
            model.start_chat(make_processor())

    def test_files(self, saved, folder, tmp_path, capsys):
        whole = folder / "model.safetensors"
        content = whole.read_bytes()
        whole.write_bytes(content[:-100])
        assert_refused(folder, f"{whole} is cut off, or is no safetensors file", capsys)
        whole.write_text(POINTER)
        assert_refused(folder, f"{whole} is a pointer of Git LFS in place of the file: run `git lfs pull`", capsys)

        shards = shutil.copytree(saved / "shards", tmp_path / "shards")
        shard = sorted(shards.glob("model-*.safetensors"))[1]
        name = min(load_file(shard))
        change_tensors(shard, lambda tensors: tensors.pop(name))
        assert_refused(shards, f"{shard}: the tensor {name}, which model.safetensors.index.json says it holds, is", capsys)
        with pytest.raises(ValueError, match=f"{shard.name}: the tensor {name} is missing"):
            AutoModel.from_pretrained(shards).start_chat(make_processor())
        index = shards / "model.safetensors.index.json"
        files = json.loads(index.read_text())["weight_map"]
        change_fields(index, "weight_map", value={one: file for one, file in files.items() if one != name})
        assert_refused(shards, f"{index}: the tensor {name} is missing", capsys)
        shard.unlink()
        assert_refused(shards, f"{shard}, which model.safetensors.index.json names, is missing", capsys)
        change_fields(index, "weight_map", value=[1])
        assert_refused(shards, f"{index} has no weight_map from tensors to files", capsys)

    def test_every_command_refuses(self, folder, saved, tmp_path, capsys):
        from peft import LoraConfig, get_peft_model

        adapter = get_peft_model(load_model(str(folder)), LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj"))
        adapter.save_pretrained(tmp_path / "adapter")
        make_processor().save_pretrained(tmp_path / "adapter")
        parts = save_parts(tmp_path / "parts")
        (tmp_path / "questions.json").write_text('{"one": [["Which digit?"]]}')
        change_tensors(folder / "model.safetensors", lambda tensors: tensors.pop(WEIGHT))
        for words in (
            f"web {folder}",
            f"serve {folder}",
            f"evaluate {folder} --conversations {tmp_path / 'questions.json'} --output {tmp_path / 'out'}",
            f"merge {tmp_path / 'adapter'} --output {tmp_path / 'out'}",
            " ".join(["train", *arguments(parts, tmp_path / "run", model_name_or_path=folder)]),
        ):
            assert cli.main(words.split()) == 2, words
            assert f"model.safetensors: the tensor {WEIGHT} is missing" in capsys.readouterr().err.splitlines()[-1]

    @pytest.mark.parametrize("kind", ["one missing", "NaN"])
    def test_an_adapter(self, kind, folder, tmp_path, capsys):
        from peft import LoraConfig, get_peft_model

        adapter = tmp_path / "adapter"
        model = get_peft_model(load_model(str(folder)), LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj"))
        model.save_pretrained(adapter)
        make_processor().save_pretrained(adapter)
        assert load_model(str(adapter)).dtype == torch.float32
        name = max(load_file(adapter / "adapter_model.safetensors"))
        if kind == "NaN":
            change_tensors(adapter / "adapter_model.safetensors", lambda tensors: tensors[name].fill_(torch.nan))
        else:
            change_tensors(adapter / "adapter_model.safetensors", lambda tensors: tensors.pop(name))
        reason = "is missing" if kind == "one missing" else "holds NaN or infinity"
        assert_refused(adapter, f"adapter_model.safetensors: the tensor {name} {reason}", capsys)

    @pytest.mark.parametrize("part", ["vision", "text"])
    def test_parts_that_are_joined(self, part, tmp_path):
        config = make_model().config
        parts = {"vision": CLIPVisionModel(config.vision_config), "text": LlamaForCausalLM(config.text_config)}
        for name, model in parts.items():
            model.save_pretrained(tmp_path / name)
        joined = VisualChatForCausalLM.from_vision_text_pretrained(str(tmp_path / "vision"), str(tmp_path / "text"))
        joined.check_weights()
        path = tmp_path / part / "model.safetensors"
        name = sorted(load_file(path))[3]
        change_tensors(path, lambda tensors: tensors.pop(name))
        with pytest.raises(ValueError, match=f"{path}: the tensor .* is missing"):
            VisualChatForCausalLM.from_vision_text_pretrained(str(tmp_path / "vision"), str(tmp_path / "text"))


class TestWhatGoesOnToWork:
    def test_random_weights_and_tied_ones(self, tmp_path):
        make_model().start_chat(make_processor())
        model = make_model(tie_word_embeddings=True)
        model.save_pretrained(tmp_path)
        make_processor().save_pretrained(tmp_path)
        assert len(load_file(tmp_path / "model.safetensors")) < len(model.state_dict())
        load_model(str(tmp_path)).start_chat(make_processor())
        AutoModel.from_pretrained(tmp_path).start_chat(make_processor())

    @needs_transformers("5.23", "the names are those in files")
    @pytest.mark.parametrize(("tower", "changes"), [("dinov2", {"use_swiglu_ffn": True}), ("dinov3_vit", {})])
    def test_towers_whose_weights_have_other_names_in_files(self, tower, changes, tmp_path):
        model = make_model(tower=tower, vision=changes)
        own, path = {name: weight.clone() for name, weight in model.state_dict().items()}, tmp_path / "model.safetensors"
        model.save_pretrained(tmp_path)
        saved = load_file(path)
        assert set(saved) != set(own)
        for tensors in (saved, own):
            save_file(tensors, path, {"format": "pt"})
            loaded = load_model(str(tmp_path)).state_dict()
            assert all(torch.equal(loaded[name], weight) for name, weight in own.items())
            missing = max(name for name in tensors if "attention" in name)
            change_tensors(path, lambda tensors, name=missing: tensors.pop(name))
            with pytest.raises(ValueError, match=rf"the tensor {missing} is missing$"):
                load_model(str(tmp_path))

    def test_weights_that_were_written_after_loading(self, folder):
        whole = load_file(folder / "model.safetensors")
        change_tensors(folder / "model.safetensors", lambda tensors: tensors.pop(WEIGHT))
        model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
        assert info["missing_keys"] == {WEIGHT}
        for same in (model, copy.deepcopy(model), copy.deepcopy(model).bfloat16()):
            with pytest.raises(ValueError, match=f"{WEIGHT} is missing"):
                same.start_chat(make_processor())
        model.load_state_dict(whole)
        model.start_chat(make_processor())
        trained = AutoModel.from_pretrained(folder)
        ids = torch.tensor([[1, 5, 9]])
        trained(input_ids=ids, labels=ids).loss.backward()
        torch.optim.SGD(trained.parameters(), lr=0.1).step()
        trained.start_chat(make_processor())

    def test_eight_bit_floats_are_read(self):
        model = make_model()
        model.lm_head.register_buffer("scale", torch.tensor([1.0, torch.nan]).to(torch.float8_e4m3fn))
        model.lm_head.register_buffer("good", torch.tensor([1.0, 2.0]).to(torch.float8_e5m2))
        assert find_not_finite(ModelWeights(model)) == ["lm_head.scale"]


CONFIGS = {
    ("text_config", "hidden_size"): {
        "abc": "'hidden_size' expected int, got str (value: 'abc')",
        0: "config.json: text_config.hidden_size is 0, but must be 1 or more",
    },
    ("text_config", "num_attention_heads"): {-1: "text_config.num_attention_heads is -1, but must be 1 or more"},
    ("text_config", "hidden_act"): {"abc": "text_config.hidden_act is 'abc', which transformers does not know"},
    ("text_config",): {(1,): "Field 'text_config'", None: "but config.json needs"},
    ("vision_config", "patch_size"): {None: "`vision_config.patch_size` is None"},
    ("text_config", "pad_token_id"): {99999: "config.json describes no model"},  # beyond the vocabulary
    ("vision_config", "num_channels"): {"abc": "'num_channels' expected int, got str"},
    ("quantization_config",): {"abc": "config.json is no config of a VisualChat"},
    ("image_token_id",): {1.5: "'image_token_id' expected int, got float"},
    ("projector",): {"abc": "'projector' expected one of"},
    ("pool_factor",): {0: "`pool_factor` must be 1 or more, got 0"},
    ("image_size",): {(16,): "`image_size` must be a number of pixels or [height, width], got [16]"},
    ("image_prefix_ids",): {(5, 999): "`image_prefix_ids` holds 999, which is no token"},
    ("learned_image_numbers",): {-1: "`learned_image_numbers` must be 0 or more, got -1", 2.5: "expected int, got float"},
    ("vision_feature_select_strategy",): {"default": "processor_config.json: image_seq_length is 5, but the projector"},
    ("text_config", "num_hidden_layers"): {2: "layers.2.input_layernorm.weight belongs to no part of the model that"},
}


class TestJson:
    @pytest.mark.parametrize(
        ("fields", "value", "message"), [(key, value, text) for key, of in CONFIGS.items() for value, text in of.items()]
    )
    def test_fields(self, fields, value, message, folder, capsys):
        change_fields(folder / "config.json", *fields, value=value)
        assert_refused(folder, message, capsys)

    @pytest.mark.parametrize(
        "file", ["config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json"]
    )
    def test_files(self, file, folder, capsys):
        path = folder / file
        contents = {"{nope": "is not JSON", "[1]": "holds a JSON list, not an object", POINTER: "is a pointer of Git LFS"}
        for content, message in contents.items():
            path.write_text(content)
            assert_refused(folder, f"{path} {message}", capsys)
        path.write_bytes(b'{"a": "\xff"}')
        assert_refused(folder, f"{path} is not JSON", capsys)

    def test_other_counts_of_learned_numbers(self, tmp_path, capsys):
        make_model(learned_image_numbers=3).save_pretrained(tmp_path)
        make_processor().save_pretrained(tmp_path)
        name = "layers.0.self_attn.image_numbers.weight"
        saved, needed = (number + TOKENS_PER_IMAGE for number in (3, 4))
        shapes = f"has the shape ({saved}, 64), but config.json needs ({needed}, 64)"
        for count, message in ((4, shapes), (0, "belongs to no part of")):
            change_fields(tmp_path / "config.json", "learned_image_numbers", value=count)
            assert_refused(tmp_path, f"{name} {message}", capsys)

    def test_a_processor(self, folder, capsys):
        change_fields(folder / "tokenizer.json", "model", value=[1])
        with pytest.raises(ValueError, match=f"{folder} describes no processor: "):
            load_processor(str(folder))
        assert_refused(folder, "describes no processor", capsys)

    def test_plan_reads_the_config_as_well(self, folder, capsys):
        change_fields(folder / "config.json", "text_config", "hidden_size", value="abc")
        with pytest.raises(SystemExit) as stop:
            cli.main(["plan", str(folder), "--gpus", "1"])
        assert stop.value.code == 2
        assert "'hidden_size' expected int, got str" in capsys.readouterr().err.splitlines()[-1]
