"""Bad examples: training and `visualchat prepare --check` name each in the same words."""

import base64
import json
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from helpers.tiny import assistant, digit_image, make_model, make_processor, text_part
from helpers.training import arguments
from modeling_visualchat import VisualChatDataCollator
from visualchat.cli import main as visualchat
from visualchat.data.checks import ImageSize, ModelRequirements, check_image_size
from visualchat.training.collator import TrainingCollator
from visualchat.training.dataset import load_examples, prepare_dataset
from visualchat.training.train import main


IMAGE = {"type": "image"}


def user(content) -> dict:
    return {"role": "user", "content": content}


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
    "images as a text": ("missing field", "images", {"messages": [user([IMAGE]), assistant("a")], "images": "good.png"}),
    "long question": ("long text", "messages[0].content", {"messages": [user("Q" * 2_500_000), assistant("a")]}),
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
# Training lists 20 at once, and no more
MORE_BAD_ROWS = {
    "image of the answer": (
        "image count",
        "messages[1].content[0]",
        {"messages": [user("Q"), {"role": "assistant", "content": [IMAGE]}], "images": ["good.png"]},
    ),
    "video": (
        "missing field",
        "messages[0].content[0].type",
        {"messages": [user([{"type": "video", "video": "a.mp4"}, text_part("Q")]), assistant("a")]},
    ),
    "a number as an image": (
        "missing field",
        "images[1]",
        {"messages": [user([IMAGE, IMAGE]), assistant("a")], "images": ["good.png", 5]},
    ),
    "long answer": ("long text", "messages[1].content", {"messages": [user("Q"), assistant("a" * 400_001)]}),
    "long blank": (
        "long text",
        "messages[0].content",
        {"messages": [user([IMAGE, text_part(" " * 400_001)]), assistant("a")], "images": ["good.png"]},
    ),
}


ALL_BAD_ROWS = BAD_ROWS | MORE_BAD_ROWS
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
        rows = [self.GOOD] * good + [{"images": [], **ALL_BAD_ROWS[name][2]} for name in names]
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    @pytest.mark.parametrize("streaming", [False, True])
    def test_the_check_and_training_name_each_with_the_same_words(self, model, capsys, streaming):
        processor = AutoProcessor.from_pretrained(model)
        requirements = ModelRequirements.of(processor, AutoConfig.from_pretrained(model))
        for name, (kind, field, _) in ALL_BAD_ROWS.items():
            self.write(name)
            assert (
                visualchat(["prepare", "--dataset", "rows.jsonl", "--check", "--model", str(model), "--num-proc", "1"]) == 1
            )
            shown = capsys.readouterr().out
            found = [line.strip() for line in shown.splitlines() if line.startswith("  rows.jsonl, example ")]
            assert len(found) == 1 and found[0].startswith(f"rows.jsonl, example 1, {field}: {kind}: "), (name, shown)

            later = streaming or name in FOUND_LATER
            with pytest.raises(ValueError, match=r"rows\.jsonl, example 1") as error:
                rows = prepare_dataset(["rows.jsonl"], processor, 512, streaming=streaming).dataset
                assert later
                TrainingCollator(processor, requirements=requirements)(list(rows))
            assert str(error.value).splitlines()[0] == found[0], name
            if not later:
                assert "1 examples have a fault" in str(error.value) and "--dataset rows.jsonl --check" in str(error.value)

    @pytest.mark.parametrize("options", [{}, {"streaming": True}, {"num_proc": 2}], ids=str)
    def test_training_goes_on_past_all_of_them_on_request(self, model, caplog, options):
        self.write(*BAD_ROWS, good=20)
        settings = {"model_name_or_path": model, "datasets": "rows.jsonl", "eval_fraction": 0.25, "seed": 3, **options}
        steps = {"num_train_epochs": 1, "max_steps": -1, "per_device_train_batch_size": 1, "generation_samples": 30}
        if "streaming" in options:
            steps["max_steps"] = 20 + len(BAD_ROWS)
        words = arguments(Path(), Path("run"), **settings, **steps)
        with pytest.raises(ValueError, match=r"rows\.jsonl, example \d+, "):
            main(words)
        caplog.clear()
        assert main([*words, "--skip_broken_images"])["broken_rows"] == len(BAD_ROWS)
        for number, (kind, field, _) in enumerate(BAD_ROWS.values(), 20):
            assert f"rows.jsonl, example {number}, {field}: {kind}: " in caplog.text
        logged = [entry for entry in json.loads(Path("run/log.json").read_text()) if "loss" in entry]
        assert logged[-1]["broken_rows"] <= len(BAD_ROWS) and all(float(entry["loss"]) > 0 for entry in logged)

    def test_a_batch_without_a_good_row(self, model):
        processor = make_processor()
        self.write("no file", "no picture")
        rows = list(prepare_dataset(["rows.jsonl"], processor, 512).dataset)
        expected = TrainingCollator(processor)(rows[:1])
        collate = TrainingCollator(processor, skip_broken_images=True, fallback_examples=rows[::-1])
        assert torch.equal(collate(rows[1:])["input_ids"], expected["input_ids"])
        assert collate.broken_rows.value == 2
        with pytest.raises(ValueError, match="No example can be used"):
            TrainingCollator(processor, skip_broken_images=True, fallback_examples=rows[1:])(rows[1:])

    def test_no_row_is_left(self, model):
        self.write("null messages", "two questions", good=0)
        with pytest.raises(ValueError, match=r"rows\.jsonl: there are no examples to train on"):
            prepare_dataset(["rows.jsonl"], make_processor(), 512, skip_invalid=True)

    def test_streamed_shards_are_named_by_their_ids(self, model):
        Path("shards").mkdir()
        for k in range(2):
            row = {"id": f"row {k}", **self.GOOD, "images": [f"none-{k}.png"]}
            datasets.Dataset.from_list([row]).to_parquet(f"shards/{k}.parquet")
        rows = list(prepare_dataset(["shards"], make_processor(), 512, streaming=True).dataset)
        for k, row in enumerate(rows):
            with pytest.raises(ValueError, match=rf"shards, example with the id 'row {k}', images\[0\]: missing image"):
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
        assert visualchat(["prepare", "--dataset", "rows.jsonl", "--check", "--model", "model", "--num-proc", "1"]) == 0
        for options in ([], ["--embed-images", "--overwrite"]):
            assert visualchat(["prepare", "--dataset", "rows.jsonl", "--output", "out", "--num-proc", "1", *options]) == 0
            for name in ("rows.jsonl", "out/rows"):
                collate = TrainingCollator(make_processor())
                prepared = prepare_dataset([name], make_processor(), 512).dataset
                assert set(prepared["num_images"]) == {1} and len(prepared) == len(rows)
                batch = collate(list(prepared))
                assert (batch["pixel_values"] == batch["pixel_values"][:1]).all()
                assert (batch["input_ids"] == batch["input_ids"][:1]).all()

    @pytest.mark.parametrize("images", ["good.png", [5]], ids=str)
    def test_a_column_of_images_that_are_none_is_named(self, model, capsys, images):
        datasets.Dataset.from_list([{**self.GOOD, "images": images}]).to_parquet("rows.parquet")
        with pytest.raises(ValueError, match=r"rows\.parquet: the column `images` must contain a list of images in each"):
            load_examples("rows.parquet")
        assert visualchat(["prepare", "--dataset", "rows.parquet", "--check"]) == 2
        assert "the column `images` must contain a list" in capsys.readouterr().err

    def test_a_line_of_1784_pixels_is_too_thin_for_224(self, model):
        """It is the first that exceeds Pillow's limit."""
        requirements = ModelRequirements.of(make_processor({"shortest_edge": 224}), AutoConfig.from_pretrained(model))
        assert check_image_size(ImageSize(1, 1783), requirements) == ("", "")
        Image.new("L", (1784, 1)).save("thin.png")
        self.write("thin")
        assert visualchat(["prepare", "--dataset", "rows.jsonl", "--check", "--num-proc", "1"]) == 1
        rows = list(prepare_dataset(["rows.jsonl"], make_processor(), 512).dataset)
        with pytest.raises(ValueError, match=r"rows\.jsonl, example 1, images\[0\]: thin image: An image of 1784×1 pixels"):
            TrainingCollator(make_processor(), requirements=requirements)(rows)
        skipping = TrainingCollator(make_processor(), skip_broken_images=True, requirements=requirements)
        assert skipping(rows)["pixel_values"].shape[0] == skipping.broken_rows.value == 1

    def test_the_stock_collator_names_the_example(self, model):
        row, wide = {"messages": [user([IMAGE]), assistant("a")]}, make_processor({"shortest_edge": 16})
        for bad, message in (
            ({"messages": None}, "example 1: the conversation is empty"),
            ({"messages": [None]}, "example 1: message 0 has the role None"),
            ({"messages": [user([None]), assistant("a")]}, "example 1: message 0, part 0 must be a dict"),
            ({"messages": [user("Q" * 400_001), assistant("a")]}, "example 1: message 0 holds 400001 characters"),
            ({**row, "images": ["page.png"]}, "example 1, image 1: page.png is not an image"),
            ({**row, "images": ["thin.png"]}, "example 1, image 1: An image of 400000×1 pixels is too thin"),
        ):
            with pytest.raises(ValueError, match=message):
                VisualChatDataCollator(wide)([self.GOOD, bad])

    def test_what_the_check_takes_as_a_model(self, model, capsys):
        self.write("thin")
        tower = make_model().model.vision_tower
        tower.save_pretrained("tower")
        make_processor({"shortest_edge": 14}).image_processor.save_pretrained("tower")  # 14² · 400,000 pixels are few enough
        make_model().model.language_model.config.save_pretrained("decoder")
        check = ["--dataset", "rows.jsonl", "--check", "--num-proc", "1"]
        assert visualchat(["prepare", *check]) == 1
        assert "with a shorter side of 224" in capsys.readouterr().out
        assert visualchat(["prepare", *check, "--model", "tower"]) == 0
        assert visualchat(["prepare", *check, "--model", "decoder"]) == 2
        assert "--model takes a VisualChat or its tower" in capsys.readouterr().err
