"""`visualchat train`: the examples that it reads, mixes and cuts."""

import base64
import json
from pathlib import Path

import datasets
import pytest
import torch

from helpers.tiny import assistant, digit_image, make_model, make_processor, text_part
from helpers.training import FEATURES, TEXT, arguments, losses, make_row
from modeling_visualchat.messages_visualchat import fill_images
from visualchat.training.collator import TrainingCollator
from visualchat.training.dataset import drop_rounds, load_examples, measure, prepare_dataset
from visualchat.training.train import main


ROOT = Path(__file__).parents[2]


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
            [{**m, "content": [p for p in m["content"]]} for m in fill_images(row, "row")], tokenize=True, return_dict=True
        )
        assert whole["length"] == len(inputs["input_ids"][0])
        cut = measure(row, processor, whole["length"] - 1)
        assert (cut["num_images"], cut["num_rounds"], cut["dropped_rounds"], cut["dropped_images"]) == (0, 2, 1, 3)
        assert measure(row, processor, 5)["length"] == 0
        system = [{"role": "system", "content": "s"}]
        assert drop_rounds(system + row["messages"], 1) == system + row["messages"][2:]

    def test_rows_without_an_answer_are_left_out_and_counted(self, parts, caplog):
        prepared = prepare_dataset([str(parts / "data")], make_processor(), max_length=75)
        assert 0 < prepared.too_long[str(parts / "data")] < 20
        assert len(prepared.dataset) == 20 - prepared.too_long[str(parts / "data")]
        assert "keep no answer within 75 tokens" in caplog.text

    def test_mixtures(self, parts, tmp_path):
        other = [make_row(k, images=1, rounds=1) | {"source": "other"} for k in range(5)]
        datasets.Dataset.from_list(other, features=FEATURES).to_parquet(tmp_path / "other.parquet")
        names = [str(parts / "data"), str(tmp_path / "other.parquet")]
        rows = prepare_dataset(names, make_processor(), 512).dataset
        assert len(rows) == 25
        weighted = prepare_dataset(names, make_processor(), 512, weights=[1, 9]).dataset
        share = sum(source == "other" for source in weighted["source"]) / len(weighted)
        assert 0.8 < share < 0.97
        streamed = list(prepare_dataset(names, make_processor(), 512, weights=[1, 1], streaming=True).dataset)
        assert {row["source"] for row in streamed} == {"source 0", "source 1", "other"}
        with pytest.raises(ValueError, match="2 datasets, but 1 weights"):
            prepare_dataset(names, make_processor(), 512, weights=[1])

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
            kept = [[row.get("id") for row in load_examples(name, streaming)] for name in names]
            assert kept == [["0", "1", "2", "3"], ["0", "1", "2", "3"], [None] * 4, [None] * 4]
            for order in (names, names[::-1]):
                rows = list(prepare_dataset(order, make_processor(), 512, weights=[1] * 4, streaming=streaming).dataset)
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
        rows = list(prepare_dataset([str(tmp_path / "rows.jsonl")], make_processor(), 512).dataset)

        batch = TrainingCollator(make_processor())(rows[:1])
        rows_of_images = [{**make_own("Which?"), "images": [digit_image(0).resize((64, 64))] * 2}]
        rows_of_images[0]["messages"][0]["content"][:0] = [{"type": "image"}] * 2
        expected = TrainingCollator(make_processor())(rows_of_images)
        assert batch["pixel_values"].shape == (2, 3, 16, 16)
        torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], atol=0, rtol=0)

        with pytest.raises(
            ValueError, match=rf"rows\.jsonl, example 1, messages\[0\]\.content\[1\]\.{key}: undecodable image"
        ):
            TrainingCollator(make_processor())(rows)
        skipping = TrainingCollator(make_processor(), skip_broken_images=True)
        assert skipping(rows)["input_ids"].shape[0] == 1
        assert skipping.broken_rows.value == 1
        assert f"Left out of the batch: {tmp_path}/rows.jsonl, example 1, messages[0].content[1].{key}" in caplog.text

    def test_the_first_key_that_is_set_counts_and_a_null_among_the_images_is_a_broken_picture(self, tmp_path):
        digit_image(0).save(tmp_path / "good.png")
        content = [{"type": "image", "image": None, "path": str(tmp_path / "good.png"), "base64": "no*base64"}]
        row = {"messages": [{"role": "user", "content": [*content, text_part("Q?")]}, assistant("a")]}
        assert TrainingCollator(make_processor())([row])["pixel_values"].shape[0] == 1
        broken = make_row(0, images=1) | {"images": [None]}
        with pytest.raises(ValueError, match=r"source 0, example with the id '0', images\[0\]: missing image"):
            TrainingCollator(make_processor())([broken])
        with pytest.raises(ValueError, match=r"source 0, example that begins .*Round 0\?.*, images\[0\]: missing image"):
            TrainingCollator(make_processor())([broken | {"id": None}])
        skipping = TrainingCollator(make_processor(), skip_broken_images=True)
        assert skipping([row, broken])["input_ids"].shape[0] == skipping.broken_rows.value == 1

    def test_json_lines_with_paths_of_pictures(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("pictures").mkdir()
        digit_image(0).save("pictures/cat.jpg")
        page = (ROOT / "docs" / "data.md").read_text()
        Path("rows.jsonl").write_text(page.split("```json\n")[1].split("```")[0])
        rows = prepare_dataset(["rows.jsonl"], make_processor(), 512).dataset
        batch = TrainingCollator(make_processor())([rows[0]])
        assert batch["pixel_values"].shape == (1, 3, 16, 16)

    def test_a_dataset_of_another_schema_is_named(self, tmp_path):
        path = tmp_path / "other.parquet"
        datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(path)
        with pytest.raises(ValueError, match=r"other\.parquet: the dataset needs a column `messages` .* got \['text'\]"):
            load_examples(str(path))
        with pytest.raises(FileNotFoundError, match="there is no data"):
            load_examples(str(tmp_path / "nothing.parquet"))

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
        with pytest.raises(ValueError, match=r"data\.parquet, example 1, images\[0\]: undecodable image: .*bad\.png"):
            main(arguments(parts, tmp_path / "stop", **settings))
        metrics = main([*arguments(parts, tmp_path / "go", **settings), "--skip_broken_images"])
        assert metrics["broken_rows"] == 1
        assert "bad.png" in caplog.text
        log = json.loads((tmp_path / "go" / "log.json").read_text())
        assert [entry["broken_rows"] for entry in log][-1] == 1
