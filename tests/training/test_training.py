"""`examples/train.py`: what it reads, what it trains in each mode, and what it leaves behind."""

import base64
import functools
import json
import math
import re
import shutil
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from helpers.tiny import assistant, digit_image, make_config, make_model, make_processor, text_part
from transformers import AutoConfig, AutoModel, AutoProcessor

from modeling_visualchat import VisualChatForCausalLM
from examples.digits_demo import make_tiny
from modeling_visualchat.data_collator_visualchat import fill_images
from visualchat.data import prepare as prepare_data
from visualchat.data.checks import Needs
from visualchat.training import train
from visualchat.training import trainer as training_loop
from visualchat.training.merge import main as merge
from visualchat.training.rows import TrainingCollator
from visualchat.training.rows import drop_rounds
from visualchat.training.rows import load_rows
from visualchat.training.rows import measure
from visualchat.training.rows import prepare_rows
from visualchat.training.train import fastest_attention
from visualchat.training.train import load_model
from visualchat.training.train import load_processor
from visualchat.training.train import main
from visualchat.training.train import parse_arguments
from visualchat.training.trainer import VisualChatTrainer
from visualchat.training.trainer import VisualChatTrainingArguments
from visualchat.training.trainer import find_whole_checkpoint
from visualchat.training.trainer import group_parameters


EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = datasets.Value("string")
FEATURES = datasets.Features(
    {
        "id": TEXT,
        "source": TEXT,
        "messages": [
            {
                "role": datasets.Value("string"),
                "content": [{"type": datasets.Value("string"), "text": datasets.Value("string")}],
            }
        ],
        "images": datasets.List(datasets.Image()),
    }
)


IMAGE = {"type": "image"}


def user(content) -> dict:
    return {"role": "user", "content": content}


def make_row(index: int, images: int = 2, rounds: int = 2) -> dict:
    messages = []
    for turn in range(rounds):
        parts = [{"type": "image", "text": None}] * (images if turn == 0 else 0)
        answer = "zero one two three"[: 4 + 5 * (index % 3)]
        messages += [{"role": "user", "content": [*parts, text_part(f"Round {turn}?")]}, assistant(answer)]
    pictures = [digit_image(index + k) for k in range(images)]
    return {"id": str(index), "source": f"source {index % 2}", "messages": messages, "images": pictures}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A tiny model's folder and a folder of rows: with several images, one, none, and unequal answers."""
    root = tmp_path_factory.mktemp("parts")
    make_model(image_number_keys=True).save_pretrained(root / "model")
    make_processor().save_pretrained(root / "model")
    rows = [make_row(k, images=k % 4, rounds=1 + k % 2) for k in range(20)]
    (root / "data").mkdir()
    datasets.Dataset.from_list(rows, features=FEATURES).to_parquet(root / "data" / "shard-00000-of-00001.parquet")
    return root


def arguments(parts: Path, output: Path, **overrides) -> list[str]:
    settings = {
        "model_name_or_path": parts / "model",
        "datasets": parts / "data",
        "output_dir": output,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": 512,
        **overrides,
    }
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def losses(output: Path) -> list[float]:
    log = json.loads((output / "log.json").read_text())
    return [float(entry["loss"]) for entry in log if "loss" in entry]


def moved(before: dict, after: dict) -> set[str]:
    return {name for name, weight in before.items() if not torch.equal(weight, after[name])}


ALIGNMENT = {
    "model.language_model.embed_tokens.weight",
    "model.multi_modal_projector.linear.weight",
    "model.multi_modal_projector.linear.bias",
    "model.multi_modal_projector.layer_norm.weight",
    "model.multi_modal_projector.layer_norm.bias",
}


class TestModes:
    def test_alignment_moves_projector_and_embedding_alone(self, parts, tmp_path):
        metrics = main(arguments(parts, tmp_path, generation_samples=2, projector_learning_rate=1e-2))
        before = AutoModel.from_pretrained(parts / "model").state_dict()
        after = AutoModel.from_pretrained(tmp_path / "model")
        assert moved(before, after.state_dict()) == ALIGNMENT
        assert {"eval_loss", "eval_exact_answers", "broken_rows"} <= set(metrics)
        for name in ("metrics.json", "log.json", "curves.png", "data.md", "data.png", "model/README.md"):
            assert (tmp_path / name).stat().st_size > 0, name
        card = (tmp_path / "model" / "README.md").read_text()
        assert f"| eval_loss | {metrics['eval_loss']:g} |" in card
        assert "| source 0 | 10 |" in card
        assert AutoProcessor.from_pretrained(tmp_path / "model").image_seq_length == 5
        assert all("broken_rows" in entry for entry in json.loads((tmp_path / "log.json").read_text()) if "loss" in entry)

    def test_full_moves_everything_that_the_logits_read(self, parts, tmp_path):
        main(arguments(parts, tmp_path, mode="full"))
        before = AutoModel.from_pretrained(parts / "model").state_dict()
        after = AutoModel.from_pretrained(tmp_path / "model").state_dict()
        still = set(before) - moved(before, after)
        assert {name.rsplit(".", 1)[0] for name in still} <= {"model.vision_tower.post_layernorm"}

    @pytest.mark.parametrize("target", ["decoder", "tower", "both"])
    def test_lora_is_saved_as_an_adapter_and_merges_into_a_plain_model(self, parts, tmp_path, target):
        from peft import PeftModel

        main(arguments(parts, tmp_path, mode="lora", lora_target=target, lora_learning_rate=1e-2))
        names = {path.name for path in (tmp_path / "model").iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "README.md"} <= names
        assert "model.safetensors" not in names
        base = AutoModel.from_pretrained(parts / "model")
        before = {name: weight.clone() for name, weight in base.state_dict().items()}
        adapted = PeftModel.from_pretrained(base, tmp_path / "model").eval()

        merge(["--adapter", str(tmp_path / "model"), "--output", str(tmp_path / "merged")])
        merged = AutoModel.from_pretrained(tmp_path / "merged").eval()
        inputs = {"input_ids": torch.arange(20, 40)[None]}
        inputs["input_ids"][:, 3:8] = merged.config.image_token_id
        inputs["pixel_values"] = torch.randn(1, 3, 16, 16)
        with torch.no_grad():
            torch.testing.assert_close(merged(**inputs).logits, adapted(**inputs).logits, atol=1e-4, rtol=1e-4)
        assert AutoProcessor.from_pretrained(tmp_path / "merged").image_seq_length == 5
        changed = moved(before, merged.state_dict())
        assert ALIGNMENT <= changed
        lora = {name for name in changed - ALIGNMENT if "_proj" in name or ".fc" in name}
        assert changed == ALIGNMENT | lora
        assert any("language_model" in name for name in lora) == (target != "tower")
        assert any("vision_tower" in name for name in lora) == (target != "decoder")


class TestInvariants:
    def test_batches_of_4_equal_4_accumulated(self, parts, tmp_path):
        main(arguments(parts, tmp_path / "a", per_device_train_batch_size=4, gradient_accumulation_steps=1))
        main(arguments(parts, tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=4))
        assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-4)
        first, second = (AutoModel.from_pretrained(tmp_path / k / "model").state_dict() for k in "ab")
        for name in ALIGNMENT:
            torch.testing.assert_close(first[name], second[name], atol=1e-4, rtol=1e-3, msg=name)

    def test_the_same_seed_gives_the_same_losses(self, parts, tmp_path):
        for run in "ab":
            main(arguments(parts, tmp_path / run))
        assert losses(tmp_path / "a") == losses(tmp_path / "b")

    def test_gradient_checkpointing_gives_the_same_losses(self, parts, tmp_path):
        main(arguments(parts, tmp_path / "a"))
        main(arguments(parts, tmp_path / "b", gradient_checkpointing=True))
        assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-6)

    def test_resuming_follows_the_run_that_was_not_interrupted(self, parts, tmp_path):
        main(arguments(parts, tmp_path / "whole", max_steps=6))
        main(arguments(parts, tmp_path / "halves", max_steps=6, save_steps=2, save_strategy="steps"))
        for step in (4, 6):  # as a kill would leave them: one cut off while it was written, one never begun
            folder = tmp_path / "halves" / f"checkpoint-{step}"
            (folder / "whole.json").unlink()
        (tmp_path / "halves" / "checkpoint-4" / "trainer_state.json").write_text("{")
        main([*arguments(parts, tmp_path / "halves", max_steps=6, save_steps=2), "--resume"])
        assert losses(tmp_path / "halves") == losses(tmp_path / "whole")

    def test_groups_of_like_length_come_in_an_order_of_seed_and_epoch_alone(self, parts, tmp_path):
        words = arguments(parts, tmp_path, train_sampling_strategy="group_by_length", save_strategy="steps", save_steps=6)
        words += ["--max_steps", "10", "--eval_fraction", "0.2", "--mode", "lora", "--lora_dropout", "0.1"]
        main(words)  # four steps an epoch: the checkpoint is in the middle of the second
        whole = losses(tmp_path)
        shutil.rmtree(tmp_path / "checkpoint-10")
        main([*words, "--resume"])
        assert losses(tmp_path) == whole

    def test_batches_hold_rows_of_like_length(self, parts, tmp_path):
        padding = {}
        for strategy in ("sequential", "group_by_length"):
            words = arguments(parts, tmp_path, train_sampling_strategy=strategy)
            model_args, _, training_args = parse_arguments([*words, "--remove_unused_columns", "False"])
            processor = load_processor(model_args)
            rows = prepare_rows([str(parts / "data")] * 5, processor, 512).rows
            trainer = VisualChatTrainer(
                model=load_model(model_args, training_args),
                args=training_args,
                train_dataset=rows,
                data_collator=TrainingCollator(processor),
                processing_class=processor,
            )
            masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
            assert sum(mask.sum() for mask in masks) == sum(rows["length"])  # every row once
            padding[strategy] = sum((mask == 0).sum().item() for mask in masks)
        assert padding["group_by_length"] < 0.8 * padding["sequential"]

    @pytest.mark.parametrize("mode", ["alignment", "lora"])
    def test_the_best_model_is_saved_and_best_and_last_checkpoint_are_kept(self, parts, tmp_path, mode):
        settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
        # As the best counts what is worst, which is where training begins
        best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
        metrics = main(arguments(parts, tmp_path, mode=mode, save_total_limit=2, **settings, **best))
        assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-4"}
        evaluations = [e for e in json.loads((tmp_path / "log.json").read_text()) if "eval_loss" in e]
        assert evaluations[0]["eval_loss"] > evaluations[3]["eval_loss"]
        assert metrics["eval_loss"] == pytest.approx(evaluations[0]["eval_loss"], abs=1e-6)
        name = "adapter_model.safetensors" if mode == "lora" else "model.safetensors"
        first, saved = (load_file(tmp_path / folder / name) for folder in ("checkpoint-1", "model"))
        assert set(saved) == set(first)
        assert not moved(first, saved)

    def test_older_checkpoints_go_only_when_the_new_one_is_whole(self, parts, tmp_path, monkeypatch):
        def stop(output_dir, save_total_limit, best):
            newest = max(Path(output_dir).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
            assert (newest / "whole.json").exists() and save_total_limit == 1
            assert len(list(Path(output_dir).glob("checkpoint-*"))) == int(newest.name.split("-")[1])

        monkeypatch.setattr(training_loop, "rotate_checkpoints", stop)
        main(arguments(parts, tmp_path, max_steps=2, save_strategy="steps", save_steps=1, save_total_limit=1))

    def test_learning_rates_by_part(self, parts):
        model = AutoModel.from_pretrained(parts / "model")
        model.freeze_for_alignment()
        args = VisualChatTrainingArguments(
            "x", learning_rate=1.0, projector_learning_rate=2.0, weight_decay=0.1, use_cpu=True
        )
        groups = [
            (group["name"], group["lr"], group["weight_decay"], len(group["params"]))
            for group in group_parameters(model, args)
        ]
        assert sorted(groups) == [("embedding", 1.0, 0.1, 1), ("projector", 2.0, 0.0, 3), ("projector", 2.0, 0.1, 1)]


class TestRows:
    def test_a_conversation_is_cut_to_the_decoders_context_too(self, parts, tmp_path, caplog):
        make_model(text={"max_position_embeddings": 160}).save_pretrained(tmp_path / "model")
        make_processor().save_pretrained(tmp_path / "model")
        row = make_row(0, rounds=8)
        datasets.Dataset.from_list([row] * 4, features=FEATURES).to_parquet(tmp_path / "rows.parquet")
        settings = {"model_name_or_path": tmp_path / "model", "datasets": tmp_path / "rows.parquet", "max_length": 4096}
        main(arguments(parts, tmp_path / "run", max_steps=1, eval_fraction=0, eval_strategy="no", **settings))
        assert "max_length is 4096, but the decoder's context holds 160 tokens" in caplog.text

    def test_oldest_rounds_go_first_with_their_images(self, parts):
        processor = make_processor()
        row = make_row(0, images=3, rounds=3)
        whole = measure(row, processor, 10_000)
        assert (whole["num_images"], whole["num_rounds"], whole["dropped_rounds"], whole["dropped_images"]) == (3, 3, 0, 0)
        inputs = processor.apply_chat_template(
            [{**m, "content": [p for p in m["content"]]} for m in make_filled(row)], tokenize=True, return_dict=True
        )
        assert whole["length"] == len(inputs["input_ids"][0])
        cut = measure(row, processor, whole["length"] - 1)
        assert (cut["num_images"], cut["num_rounds"], cut["dropped_rounds"], cut["dropped_images"]) == (0, 2, 1, 3)
        assert measure(row, processor, 5)["length"] == 0
        system = [{"role": "system", "content": "s"}]
        assert drop_rounds(system + row["messages"], 1) == system + row["messages"][2:]

    def test_rows_without_an_answer_are_left_out_and_counted(self, parts, caplog):
        prepared = prepare_rows([str(parts / "data")], make_processor(), max_length=75)
        assert 0 < prepared.too_long[str(parts / "data")] < 20
        assert len(prepared.rows) == 20 - prepared.too_long[str(parts / "data")]
        assert "keep no answer within 75 tokens" in caplog.text

    def test_mixtures(self, parts, tmp_path):
        other = [make_row(k, images=1, rounds=1) | {"source": "other"} for k in range(5)]
        datasets.Dataset.from_list(other, features=FEATURES).to_parquet(tmp_path / "other.parquet")
        names = [str(parts / "data"), str(tmp_path / "other.parquet")]
        rows = prepare_rows(names, make_processor(), 512).rows
        assert len(rows) == 25
        weighted = prepare_rows(names, make_processor(), 512, weights=[1, 9]).rows
        share = sum(source == "other" for source in weighted["source"]) / len(weighted)
        assert 0.8 < share < 0.97
        streamed = list(prepare_rows(names, make_processor(), 512, weights=[1, 1], streaming=True).rows)
        assert {row["source"] for row in streamed} == {"source 0", "source 1", "other"}
        with pytest.raises(ValueError, match="2 datasets, but 1 weights"):
            prepare_rows(names, make_processor(), 512, weights=[1])

    def test_mixtures_of_rows_with_ids_of_any_kind_and_without(self, parts, tmp_path):
        named = datasets.Dataset.from_list([make_row(k, images=1, rounds=1) for k in range(4)], features=FEATURES)
        forms = {
            "text": named,
            "number": named.cast_column("id", datasets.Value("int64")),
            "nested": named.map(lambda row: {"id": [row["id"]]}, features=datasets.Features({**FEATURES, "id": [TEXT]})),
            "none": named.remove_columns("id"),
        }
        names = [str(tmp_path / f"{form}.parquet") for form in forms]
        for name, rows in zip(names, forms.values()):
            rows.to_parquet(name)
        for streaming in (False, True):
            kept = [[row.get("id") for row in load_rows(name, streaming)] for name in names]
            assert kept == [["0", "1", "2", "3"], ["0", "1", "2", "3"], [None] * 4, [None] * 4]
            for order in (names, names[::-1]):
                rows = list(prepare_rows(order, make_processor(), 512, weights=[1] * 4, streaming=streaming).rows)
                assert {row["id"] for row in rows} == {"0", "1", "2", "3", None}
        for run, more in (("kept", []), ("streamed", ["--streaming", "True", "--eval_fraction", "0"])):
            words = [*arguments(parts, tmp_path / run, max_steps=3), *more, "--datasets", *names]
            assert main(words)["broken_rows"] == 0
            assert len(losses(tmp_path / run)) == 3

    @pytest.mark.parametrize("key", ["image", "url", "path", "base64"])
    def test_pictures_of_the_parts_themselves(self, tmp_path, caplog, key):
        def make_own(question, *pictures):
            parts = [{"type": "image", key: picture} for picture in pictures]
            return {"messages": [{"role": "user", "content": [*parts, text_part(question)]}, assistant("a")], "images": []}

        def as_given(path):
            return base64.b64encode(path.read_bytes()).decode() if key == "base64" else str(path)

        digit_image(0).resize((64, 64)).save(tmp_path / "good.png")
        (tmp_path / "bad.png").write_bytes(b"no picture " * 40)
        good, bad = as_given(tmp_path / "good.png"), as_given(tmp_path / "bad.png")
        rows = [make_own("Which?", good, good), make_own("Broken?", good, bad)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows = list(prepare_rows([str(tmp_path / "rows.jsonl")], make_processor(), 512).rows)

        batch = TrainingCollator(make_processor())(rows[:1])
        rows_of_images = [{**make_own("Which?"), "images": [digit_image(0).resize((64, 64))] * 2}]
        rows_of_images[0]["messages"][0]["content"][:0] = [{"type": "image"}] * 2
        expected = TrainingCollator(make_processor())(rows_of_images)
        assert batch["pixel_values"].shape == (2, 3, 16, 16)
        torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], atol=0, rtol=0)

        with pytest.raises(ValueError, match=rf"rows\.jsonl, row 1, messages\[0\]\.content\[1\]\.{key}: undecodable image"):
            TrainingCollator(make_processor())(rows)
        skipping = TrainingCollator(make_processor(), skip_broken_images=True)
        assert skipping(rows)["input_ids"].shape[0] == 1
        assert skipping.broken_rows.value == 1
        assert f"Left out of the batch: {tmp_path}/rows.jsonl, row 1, messages[0].content[1].{key}" in caplog.text

    def test_the_first_key_that_is_set_counts_and_a_null_among_the_images_is_a_broken_picture(self, tmp_path):
        digit_image(0).save(tmp_path / "good.png")
        content = [{"type": "image", "image": None, "path": str(tmp_path / "good.png"), "base64": "no*base64"}]
        row = {"messages": [{"role": "user", "content": [*content, text_part("Q?")]}, assistant("a")]}
        assert TrainingCollator(make_processor())([row])["pixel_values"].shape[0] == 1
        broken = make_row(0, images=1) | {"images": [None]}
        with pytest.raises(ValueError, match=r"source 0, row with the id '0', images\[0\]: missing image"):
            TrainingCollator(make_processor())([broken])
        with pytest.raises(ValueError, match=r"source 0, row that begins .*Round 0\?.*, images\[0\]: missing image"):
            TrainingCollator(make_processor())([broken | {"id": None}])
        skipping = TrainingCollator(make_processor(), skip_broken_images=True)
        assert skipping([row, broken])["input_ids"].shape[0] == skipping.broken_rows.value == 1

    def test_json_lines_with_paths_of_pictures(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("pictures").mkdir()
        digit_image(0).save("pictures/cat.jpg")
        readme = (EXAMPLES.parent / "README.md").read_text()
        Path("rows.jsonl").write_text(readme.split("```json\n")[1].split("```")[0])
        rows = prepare_rows(["rows.jsonl"], make_processor(), 512).rows
        batch = TrainingCollator(make_processor())([rows[0]])
        assert batch["pixel_values"].shape == (1, 3, 16, 16)

    def test_a_dataset_of_another_schema_is_named(self, tmp_path):
        path = tmp_path / "other.parquet"
        datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(path)
        with pytest.raises(ValueError, match=r"other\.parquet: rows need a column `messages` .* got \['text'\]"):
            load_rows(str(path))
        with pytest.raises(FileNotFoundError, match="there is no data"):
            load_rows(str(tmp_path / "nothing.parquet"))

    def test_a_broken_picture_stops_the_run_or_is_named_and_counted(self, parts, tmp_path, caplog):
        rows = datasets.Dataset.from_parquet(str(parts / "data" / "shard-00000-of-00001.parquet"))
        rows = rows.cast_column("images", datasets.List(datasets.Image(decode=False))).to_list()
        (tmp_path / "bad.png").write_bytes(b"no picture")
        rows[1]["images"] = [{"bytes": None, "path": str(tmp_path / "bad.png")}]
        features = FEATURES.copy()
        features["images"] = datasets.List(datasets.Image(decode=False))
        data = tmp_path / "data.parquet"
        datasets.Dataset.from_list(rows, features=features).to_parquet(data)
        settings = {"datasets": data, "num_train_epochs": 1, "max_steps": -1, "eval_fraction": 0.05}
        with pytest.raises(ValueError, match=r"data\.parquet, row 1, images\[0\]: undecodable image: .*bad\.png"):
            main(arguments(parts, tmp_path / "stop", **settings))
        metrics = main([*arguments(parts, tmp_path / "go", **settings), "--skip_broken_images"])
        assert metrics["broken_rows"] == 1
        assert "bad.png" in caplog.text
        log = json.loads((tmp_path / "go" / "log.json").read_text())
        assert [entry["broken_rows"] for entry in log][-1] == 1


BAD_ROWS = {
    "null messages": ("missing field", "messages", {"messages": None}),
    "no messages": ("odd turns", "messages", {"messages": []}),
    "null message": ("missing field", "messages[0]", {"messages": [None, assistant("a")]}),
    "null role": ("missing field", "messages[0].role", {"messages": [{"role": None, "content": "Q"}, assistant("a")]}),
    "null content": ("missing field", "messages[0].content", {"messages": [user(None), assistant("a")]}),
    "null answer": (
        "missing field",
        "messages[1].content",
        {"messages": [user("Q"), {"role": "assistant", "content": None}]},
    ),
    "null part": ("missing field", "messages[0].content[1]", {"messages": [user([text_part("Q"), None]), assistant("a")]}),
    "null text": ("missing field", "messages[0].content[0].text", {"messages": [user([text_part(None)]), assistant("a")]}),
    "null type": ("missing field", "messages[0].content[0].type", {"messages": [user([{"type": None}]), assistant("a")]}),
    "no URL": (
        "missing image",
        "messages[0].content[0].image_url",
        {"messages": [user([{"type": "image_url"}]), assistant("a")]},
    ),
    "placeholder": ("image count", "messages[0].content", {"messages": [user("<image> What?"), assistant("a")]}),
    "placeholder of the answer": ("image count", "messages[1].content", {"messages": [user("Q"), assistant("<image>")]}),
    "two questions": ("odd turns", "messages[1].role", {"messages": [user("Q"), user("Q"), assistant("a")]}),
    "no answer": ("odd turns", "messages", {"messages": [user("Q")]}),
    "answer first": ("odd turns", "messages[0].role", {"messages": [assistant("a"), user("Q")]}),
    "unknown role": ("odd turns", "messages[0].role", {"messages": [{"role": "tool", "content": "Q"}, assistant("a")]}),
    "one image for two": (
        "image count",
        "images",
        {"messages": [user([IMAGE, IMAGE]), assistant("a")], "images": ["good.png"]},
    ),
    "null image": ("missing image", "images[0]", {"messages": [user([IMAGE]), assistant("a")], "images": [None]}),
    "no file": ("missing image", "images[0]", {"messages": [user([IMAGE]), assistant("a")], "images": ["none.png"]}),
    "no picture": ("undecodable image", "images[0]", {"messages": [user([IMAGE]), assistant("a")], "images": ["page.png"]}),
    "cut off": ("truncated image", "images[0]", {"messages": [user([IMAGE]), assistant("a")], "images": ["cut.jpg"]}),
    "thin": ("thin image", "images[0]", {"messages": [user([IMAGE]), assistant("a")], "images": ["thin.png"]}),
    "own thin": (
        "thin image",
        "messages[0].content[0].path",
        {"messages": [user([{**IMAGE, "path": "~/thin.png"}]), assistant("a")]},
    ),
    "too many images": (
        "image count",
        "messages",
        {"messages": [user([IMAGE] * 13), assistant("a")], "images": ["good.png"] * 13},
    ),
}
FOUND_LATER = ("no file", "no picture", "cut off", "thin", "own thin", "too many images")  # when pictures are opened


class TestBadRows:
    @pytest.fixture
    def model(self, tmp_path, monkeypatch):
        """A folder of a model, beside pictures of all kinds, where the test runs."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        make_model(image_number_keys=True).save_pretrained("model")
        make_processor({"shortest_edge": 16}).save_pretrained("model")
        digit_image(0).save("good.png")
        digit_image(0).resize((64, 64)).save("cut.jpg")
        Path("cut.jpg").write_bytes(Path("cut.jpg").read_bytes()[:-200])
        Path("page.png").write_text("<html>404</html>")
        Image.new("L", (400_000, 1)).save("thin.png")
        return Path("model")

    GOOD = {"messages": [user([IMAGE, text_part("Which?")]), assistant("seven")], "images": ["good.png"]}

    def write(self, *names, good=1):
        """`rows.jsonl`: so many good rows, and then the bad ones."""
        rows = [self.GOOD] * good + [{"images": [], **BAD_ROWS[name][2]} for name in names]
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    @pytest.mark.parametrize("streaming", [False, True])
    def test_the_check_and_training_name_each_with_the_same_words(self, model, capsys, streaming):
        processor = AutoProcessor.from_pretrained(model)
        needs = Needs.of(processor, AutoConfig.from_pretrained(model))
        for name, (kind, field, _) in BAD_ROWS.items():
            self.write(name)
            assert prepare_data.main(["--dataset", "rows.jsonl", "--check", "--model", str(model), "--num-proc", "1"]) == 1
            shown = capsys.readouterr().out
            found = [line.strip() for line in shown.splitlines() if line.startswith("  rows.jsonl, row ")]
            assert len(found) == 1 and found[0].startswith(f"rows.jsonl, row 1, {field}: {kind}: "), (name, shown)

            later = streaming or name in FOUND_LATER
            with pytest.raises(ValueError, match=r"rows\.jsonl, row 1") as error:
                rows = prepare_rows(["rows.jsonl"], processor, 512, streaming=streaming).rows
                assert later
                TrainingCollator(processor, needs=needs)(list(rows))
            assert str(error.value).splitlines()[0] == found[0], name
            if not later:
                assert "1 rows have a fault" in str(error.value) and "--dataset rows.jsonl --check" in str(error.value)

    @pytest.mark.parametrize("options", [{}, {"streaming": True}, {"num_proc": 2}], ids=str)
    def test_training_goes_on_past_all_of_them_on_request(self, model, caplog, options):
        self.write(*BAD_ROWS, good=20)
        settings = {"model_name_or_path": model, "datasets": "rows.jsonl", "eval_fraction": 0.25, "seed": 3, **options}
        steps = {"num_train_epochs": 1, "max_steps": -1, "per_device_train_batch_size": 1, "generation_samples": 30}
        if "streaming" in options:
            steps["max_steps"] = 20 + len(BAD_ROWS)
        words = arguments(Path(), Path("run"), **settings, **steps)
        with pytest.raises(ValueError, match=r"rows\.jsonl, row \d+, "):
            main(words)
        caplog.clear()
        assert main([*words, "--skip_broken_images"])["broken_rows"] == len(BAD_ROWS)
        for number, (kind, field, _) in enumerate(BAD_ROWS.values(), 20):
            assert f"rows.jsonl, row {number}, {field}: {kind}: " in caplog.text
        logged = [entry for entry in json.loads(Path("run/log.json").read_text()) if "loss" in entry]
        assert logged[-1]["broken_rows"] <= len(BAD_ROWS) and all(float(entry["loss"]) > 0 for entry in logged)

    def test_a_batch_without_a_good_row(self, model):
        processor = make_processor()
        self.write("no file", "no picture")
        rows = list(prepare_rows(["rows.jsonl"], processor, 512).rows)
        expected = TrainingCollator(processor)(rows[:1])
        collate = TrainingCollator(processor, skip_broken_images=True, stand_ins=rows[::-1])
        assert torch.equal(collate(rows[1:])["input_ids"], expected["input_ids"])
        assert collate.broken_rows.value == 2
        with pytest.raises(ValueError, match="No row can be used"):
            TrainingCollator(processor, skip_broken_images=True, stand_ins=rows[1:])(rows[1:])

    def test_no_row_is_left(self, model):
        self.write("null messages", "two questions", good=0)
        with pytest.raises(ValueError, match=r"rows\.jsonl: there are no rows to train on"):
            prepare_rows(["rows.jsonl"], make_processor(), 512, skip_faulty=True)

    def test_streamed_shards_are_named_by_their_ids(self, model):
        Path("shards").mkdir()
        for k in range(2):
            row = {"id": f"row {k}", **self.GOOD, "images": [f"none-{k}.png"]}
            datasets.Dataset.from_list([row]).to_parquet(f"shards/{k}.parquet")
        rows = list(prepare_rows(["shards"], make_processor(), 512, streaming=True).rows)
        for k, row in enumerate(rows):
            with pytest.raises(ValueError, match=rf"shards, row with the id 'row {k}', images\[0\]: missing image"):
                TrainingCollator(make_processor())([row])

    def test_pictures_in_every_form_train_as_they_were_checked(self, model):
        png = base64.encodebytes(Path("good.png").read_bytes()).decode()
        sources = ["good.png", "~/good.png", Path("good.png").resolve().as_uri(), f"DATA:image/png;base64,{png}", png]
        rows = [{**self.GOOD, "images": [source]} for source in sources]
        for key in ("image", "url", "path", "base64", "image_url"):
            kind = "image_url" if key == "image_url" else "image"
            for source in sources:
                source = {"url": source} if key == "image_url" else source
                rows.append({"messages": [user([{"type": kind, key: source}, text_part("Which?")]), assistant("seven")]})
        Path("rows.jsonl").write_text("".join(json.dumps({"images": [], **row}) + "\n" for row in rows))
        assert prepare_data.main(["--dataset", "rows.jsonl", "--check", "--model", "model", "--num-proc", "1"]) == 0
        for options in ([], ["--embed-images", "--overwrite"]):
            assert prepare_data.main(["--dataset", "rows.jsonl", "--output", "out", "--num-proc", "1", *options]) == 0
            for name in ("rows.jsonl", "out/rows"):
                collate = TrainingCollator(make_processor())
                prepared = prepare_rows([name], make_processor(), 512).rows
                assert set(prepared["num_images"]) == {1} and len(prepared) == len(rows)
                batch = collate(list(prepared))
                assert (batch["pixel_values"] == batch["pixel_values"][:1]).all()
                assert (batch["input_ids"] == batch["input_ids"][:1]).all()

    def test_images_that_are_no_lists_are_named(self, model, capsys):
        Path("rows.jsonl").write_text(json.dumps({**self.GOOD, "images": "good.png"}) + "\n")
        with pytest.raises(ValueError, match=r"rows\.jsonl: the column `images` must hold a list of pictures in each row"):
            load_rows("rows.jsonl")
        assert prepare_data.main(["--dataset", "rows.jsonl", "--check"]) == 2
        assert "the column `images` must hold a list" in capsys.readouterr().err

    def test_what_the_check_takes_as_a_model(self, model, capsys):
        self.write("thin")
        tower = make_model().model.vision_tower
        tower.save_pretrained("tower")
        make_processor({"shortest_edge": 14}).image_processor.save_pretrained("tower")  # 14² · 400,000 pixels are few enough
        make_model().model.language_model.config.save_pretrained("decoder")
        check = ["--dataset", "rows.jsonl", "--check", "--num-proc", "1"]
        assert prepare_data.main(check) == 1
        assert "with a shorter side of 224" in capsys.readouterr().out
        assert prepare_data.main([*check, "--model", "tower"]) == 0
        assert prepare_data.main([*check, "--model", "decoder"]) == 2
        assert "--model takes a VisualChat or its tower" in capsys.readouterr().err


def make_checkpoint(output: Path) -> Path:
    """A whole checkpoint of one process, as far as `--resume` looks at it."""
    folder = output / "checkpoint-4"
    folder.mkdir()
    (folder / "whole.json").write_text(json.dumps({"step": 4, "world_size": 1}))
    (folder / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": None}))
    return folder


class TestContradictions:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"streaming": True, "max_steps": -1}, "streaming: true .* needs max_steps, got -1"),
            (
                {"streaming": True, "train_sampling_strategy": "group_by_length"},
                "streaming: true .* needs train_sampling_strategy: random .* got group_by_length",
            ),
            ({"streaming": True, "eval_strategy": "steps"}, "streaming: true .* needs eval_strategy: no, got steps"),
            ({"eval_fraction": 0, "eval_strategy": "epoch"}, "eval_fraction: 0 .* needs eval_strategy: no, got epoch"),
            ({"load_in_4bit": True}, "load_in_4bit .* needs mode: lora, got alignment"),
            ({"label_smoothing_factor": 0.1, "torch_compile": True}, "label_smoothing_factor needs torch_compile: false"),
        ],
    )
    def test_both_fields_are_named_before_any_work_starts(self, parts, tmp_path, fields, message):
        with pytest.raises(ValueError, match=message):
            main(arguments(parts, tmp_path / "run", **fields))
        assert not (tmp_path / "run").exists()

    def test_a_checkpoint_of_deepspeed_and_a_run_without_it(self, parts, tmp_path, monkeypatch):
        def no_work(*arguments):
            raise AssertionError("the run had begun")

        folder = make_checkpoint(tmp_path)
        words = [*arguments(parts, tmp_path), "--resume"]
        monkeypatch.setattr(train, "load_processor", no_work)
        with pytest.raises(AssertionError, match="the run had begun"):
            train.main(words)
        (folder / "global_step4").mkdir()
        with pytest.raises(ValueError, match=rf"{folder} holds .* DeepSpeed's form, .*: add --deepspeed FILE"):
            train.main(words)

    def test_a_run_of_deepspeed_and_a_checkpoint_without_it(self, tmp_path):
        folder = make_checkpoint(tmp_path)
        args = VisualChatTrainingArguments(str(tmp_path), use_cpu=True)
        assert find_whole_checkpoint(args) == str(folder)
        args.deepspeed, args.deepspeed_plugin = "zero2.json", "of zero2.json"
        with pytest.raises(ValueError, match=rf"{folder} holds nothing of DeepSpeed, .* zero2\.json: leave out --deepspeed"):
            find_whole_checkpoint(args)
        (folder / "global_step4").mkdir()
        assert find_whole_checkpoint(args) == str(folder)

    def test_streamed_rows_train_without_evaluation(self, parts, tmp_path):
        assert main(arguments(parts, tmp_path, streaming=True)) == {"broken_rows": 0}
        assert len(losses(tmp_path)) == 4


class TestQuantized:
    def test_4_bits_for_the_decoders_layers_alone(self, parts, tmp_path, monkeypatch):
        from transformers.quantizers.quantizers_utils import should_convert_module

        given = {}

        def from_pretrained(name, **kwargs):
            given.update(kwargs)
            return make_model()

        monkeypatch.setattr(train.AutoModel, "from_pretrained", from_pretrained)
        model_args, _, training_args = train.parse_arguments(arguments(parts, tmp_path, mode="lora", load_in_4bit=True))
        train.load_model(model_args, training_args)
        config = given["quantization_config"]
        assert config.load_in_4bit
        assert (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
        linear = {name for name, module in make_model().named_modules() if isinstance(module, torch.nn.Linear)}
        quantized = {name for name in linear if should_convert_module(name, config.llm_int8_skip_modules)}
        assert quantized == {name for name in linear if name.startswith("model.language_model.layers.")}
        assert linear - quantized > {"lm_head", "model.multi_modal_projector.linear"}

    def test_without_bitsandbytes_it_is_named_before_any_work_starts(self, parts, tmp_path, monkeypatch):
        monkeypatch.setattr(train, "is_bitsandbytes_available", lambda: False)
        with pytest.raises(ImportError, match="load_in_4bit needs bitsandbytes: pip install"):
            train.main(arguments(parts, tmp_path / "run", mode="lora", load_in_4bit=True))
        assert not (tmp_path / "run").exists()


# hidden, intermediate, layers, heads, key-value heads of LLaMA-2
LLAMA_2 = {
    "7b": (4096, 11008, 32, 32, 32),
    "13b": (5120, 13824, 40, 40, 40),
    "70b": (8192, 28672, 80, 64, 8),
}


def make_paper_model(size: str):
    """The model of recipes/paper-*.yaml, without memory for its weights."""
    hidden, intermediate, layers, heads, key_value_heads = LLAMA_2[size]
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {
        "vocab_size": 32001,  # LLaMA-2's and the image token
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
    }
    config = make_config(image_token_id=32000, vision={**vision, "image_size": 224, "patch_size": 14}, text=text)
    with torch.device("meta"):
        model = VisualChatForCausalLM._from_config(config)
    model.freeze_for_alignment()
    return model


@pytest.mark.parametrize("size", sorted(LLAMA_2))
def test_the_papers_recipes_fill_their_deepspeed_json_and_reach_the_batch_they_name(size, tmp_path, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    recipe = Path(f"examples/recipes/paper-{size}.yaml")
    batch, processes = map(int, re.search(r"batch (\d+) on (\d+) GPUs", recipe.read_text()).groups())
    command = re.search(r"# +torchrun (.*) examples/train.py (\S+)", recipe.read_text())
    assert command.group(2) == str(recipe)
    counts = re.findall(r"--(?:nnodes|nproc_per_node) (\d+)", command.group(1))
    assert math.prod(map(int, counts)) == processes

    model = make_paper_model(size)  # before the arguments, after which ZeRO-3 shares out what is made
    monkeypatch.setattr(VisualChatTrainingArguments, "world_size", processes)
    words = ["--use_cpu", "--bf16", "False", "--output_dir", str(tmp_path)]
    _, _, training_args = parse_arguments([str(recipe), *words])
    assert f"LLaMA-2-{size.upper()}" in recipe.read_text()
    filled = training_args.hf_deepspeed_config
    filled.trainer_config_finalize(training_args, model, num_training_steps=1000)
    assert "auto" not in json.dumps(filled.config)
    assert filled.config["train_batch_size"] == batch == 128
    zero = filled.config["zero_optimization"]
    if zero["stage"] == 3:
        hidden = LLAMA_2[size][0]
        assert (zero["reduce_bucket_size"], zero["stage3_prefetch_bucket_size"]) == (hidden**2, int(0.9 * hidden**2))


def test_the_readmes_arithmetic_of_memory():
    """Bytes under bf16 and Adam: 2 for a weight, and 2 + 12 more if it trains (ZeRO, arXiv 1910.02054, section 3.1)."""
    columns = []
    for size, (hidden, _, layers, _, _) in LLAMA_2.items():
        model = make_paper_model(size)
        total = sum(parameter.numel() for parameter in model.parameters())
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        recipe = yaml.safe_load((EXAMPLES / "recipes" / f"paper-{size}.yaml").read_text())
        micro, accumulation = recipe["per_device_train_batch_size"], recipe["gradient_accumulation_steps"]
        gpus = 128 // (micro * accumulation)
        name = Path(recipe["deepspeed"]).stem
        weights = 2 * total / (gpus if name == "zero3" else 1)  # ZeRO-2 shares out the rest alone
        assert recipe["gradient_checkpointing"]
        columns.append(
            {
                "parameters, all · trained in `alignment`": f"{total / 1e9:.2f} · {trained / 1e9:.2f} billion",
                "DeepSpeed JSON": f"`{name}.json`",
                "micro-batch × accumulation × GPUs": f"{micro} × {accumulation} × {gpus}",
                "GB a GPU: `alignment` · `full`": (
                    f"{(weights + 14 * trained / gpus) / 1e9:.1f} · {(weights + 14 * total / gpus) / 1e9:.1f}"
                ),
                "GB a row of 4,096 tokens keeps (its layers' inputs)": f"{2 * 4096 * hidden * layers / 1e9:.1f}",
                "million parameters in `reduce` · `prefetch` buckets, by `auto`": (
                    f"{hidden**2 / 1e6:.0f} · {0.9 * hidden**2 / 1e6:.0f}" if name == "zero3" else "500 (default) · –"
                ),
                "GB of the host that gathers weights on save": f"{2 * total / 1e9:.0f}" if name == "zero3" else "–",
            }
        )
    readme = (EXAMPLES.parent / "README.md").read_text()
    for key in columns[0]:
        assert f"| {' | '.join([key, *(column[key] for column in columns)])} |" in readme


@pytest.mark.parametrize("answers_only", [False, True])
def test_trls_sft_trainer_needs_no_glue(parts, tmp_path, answers_only):
    from trl import SFTConfig, SFTTrainer

    model = AutoModel.from_pretrained(parts / "model")
    model.freeze_for_alignment()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    rows = datasets.Dataset.from_list([make_row(k, images=1 + k % 2) for k in range(8)], features=FEATURES)
    config = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        max_length=None,
        assistant_only_loss=answers_only,
        use_cpu=True,
        bf16=False,
        report_to="none",
        logging_steps=1,
    )
    processor = AutoProcessor.from_pretrained(parts / "model")
    trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=processor)
    trainer.train()
    logged = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    assert all(loss > 0 for loss in logged)
    assert moved(before, model.state_dict()) == ALIGNMENT


def make_filled(row):
    return fill_images(row, "row")


def test_recipes_are_read_and_their_fields_known(parts, tmp_path):
    for recipe in sorted((EXAMPLES / "recipes").glob("*.yaml")):
        model_args, data_args, training_args = parse_arguments(
            [str(recipe), "--use_cpu", "--bf16", "False", "--fp16", "False", "--output_dir", str(tmp_path), "--seed", "7"]
        )
        assert training_args.seed == 7
        assert model_args.mode in ("alignment", "lora", "full")
        assert data_args.datasets
    (tmp_path / "wrong.yaml").write_text("learning_rat: 1\n")
    with pytest.raises(ValueError, match=r"wrong\.yaml: unknown fields learning_rat"):
        parse_arguments([str(tmp_path / "wrong.yaml")])


def test_joining_a_tower_and_a_decoder(parts, tmp_path):
    from transformers import LlamaForCausalLM

    model = make_model(text={"vocab_size": 320}, image_token_id=5)
    model.model.vision_tower.save_pretrained(tmp_path / "tower")
    make_processor().image_processor.save_pretrained(tmp_path / "tower")
    LlamaForCausalLM(model.config.text_config).save_pretrained(tmp_path / "decoder")
    make_processor().tokenizer.save_pretrained(tmp_path / "decoder")
    words = arguments(
        parts, tmp_path / "run", vision_name_or_path=tmp_path / "tower", text_name_or_path=tmp_path / "decoder"
    )
    where = words.index("--model_name_or_path")
    main([*words[:where], *words[where + 2 :], "--image_number_keys", "True", "--max_steps", "2"])
    trained = AutoModel.from_pretrained(tmp_path / "run" / "model")
    assert trained.config.image_number_keys
    assert trained.config.image_token_id == 320


def test_parts_of_other_families_are_refused_before_any_work_starts(parts, tmp_path):
    from transformers import LlamaForCausalLM

    model = make_model()
    model.model.vision_tower.save_pretrained(tmp_path / "tower")
    LlamaForCausalLM(model.config.text_config).save_pretrained(tmp_path / "decoder")
    make_processor().tokenizer.save_pretrained(tmp_path / "decoder")
    words = arguments(
        parts, tmp_path / "run", vision_name_or_path=tmp_path / "decoder", text_name_or_path=tmp_path / "tower"
    )
    where = words.index("--model_name_or_path")
    with pytest.raises(TypeError, match=r"`vision`: .*decoder has the model_type 'llama', but the vision tower must be of"):
        main([*words[:where], *words[where + 2 :]])
    assert not (tmp_path / "run" / "joined").exists()
    with pytest.raises(ValueError, match=r"decoder has no processor of a VisualChat, but a .*: to join"):
        main(arguments(parts, tmp_path / "run", model_name_or_path=tmp_path / "decoder"))


def test_the_tiny_recipe_runs_as_the_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tiny.main(["--rows", "40"])
    words = [str(EXAMPLES / "recipes" / "tiny.yaml"), "--per_device_train_batch_size", "4"]
    metrics = main([*words, "--max_steps", "4", "--eval_steps", "2", "--save_steps", "2", "--generation_samples", "2"])
    assert {"eval_loss", "eval_exact_answers"} <= set(metrics)
    assert list(Path("outputs/tiny/run").glob("**/events.out.tfevents.*"))
    assert AutoModel.from_pretrained("outputs/tiny/run/model").config.image_number_keys


class TestFastestAttention:
    def choose(self, device="cuda", **settings):
        return fastest_attention(make_config(**settings), torch.device(device))

    def test_flex_attention_on_a_gpu_for_the_variants_that_it_computes(self, monkeypatch):
        monkeypatch.setattr(train, "try_flex_attention", lambda config, device: None)
        assert self.choose() == self.choose(multimodal_attention="mmca_merged") == "flex_attention"
        assert self.choose(device="cpu") == self.choose(multimodal_attention="causal") == "sdpa"
        assert self.choose(text={"attention_dropout": 0.1}) == "sdpa"

    def test_sdpa_where_it_does_not_compile(self, monkeypatch, caplog):
        monkeypatch.setattr(train, "try_flex_attention", functools.partial(self.try_on_the_cpu, train.try_flex_attention))
        assert self.choose() == "sdpa"
        assert "Trains by SDPA: flex attention does not compile here" in caplog.text
        assert "FlexAttention does not support backward on CPU" in caplog.text

    def try_on_the_cpu(self, try_flex_attention, config, device):
        try_flex_attention(config, torch.device("cpu"))
