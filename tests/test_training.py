"""`examples/train.py`: what it reads, what it trains in each mode, and what it leaves behind."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from tiny import assistant, digit_image, make_model, make_processor, text_part
from transformers import AutoModel, AutoProcessor


EXAMPLES = Path(__file__).parent.parent / "examples"
FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "source": datasets.Value("string"),
        "messages": [
            {
                "role": datasets.Value("string"),
                "content": [{"type": datasets.Value("string"), "text": datasets.Value("string")}],
            }
        ],
        "images": datasets.List(datasets.Image()),
    }
)


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


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
        from train import main

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
        from train import main

        main(arguments(parts, tmp_path, mode="full"))
        before = AutoModel.from_pretrained(parts / "model").state_dict()
        after = AutoModel.from_pretrained(tmp_path / "model").state_dict()
        still = set(before) - moved(before, after)
        assert {name.rsplit(".", 1)[0] for name in still} <= {"model.vision_tower.post_layernorm"}

    @pytest.mark.parametrize("target", ["decoder", "tower", "both"])
    def test_lora_is_saved_as_an_adapter_and_merges_into_a_plain_model(self, parts, tmp_path, target):
        from merge_adapter import main as merge
        from peft import PeftModel
        from train import main

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
        from train import main

        main(arguments(parts, tmp_path / "a", per_device_train_batch_size=4, gradient_accumulation_steps=1))
        main(arguments(parts, tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=4))
        assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-4)
        first, second = (AutoModel.from_pretrained(tmp_path / k / "model").state_dict() for k in "ab")
        for name in ALIGNMENT:
            torch.testing.assert_close(first[name], second[name], atol=1e-4, rtol=1e-3, msg=name)

    def test_the_same_seed_gives_the_same_losses(self, parts, tmp_path):
        from train import main

        for run in "ab":
            main(arguments(parts, tmp_path / run))
        assert losses(tmp_path / "a") == losses(tmp_path / "b")

    def test_gradient_checkpointing_gives_the_same_losses(self, parts, tmp_path):
        from train import main

        main(arguments(parts, tmp_path / "a"))
        main(arguments(parts, tmp_path / "b", gradient_checkpointing=True))
        assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-6)

    def test_resuming_follows_the_run_that_was_not_interrupted(self, parts, tmp_path):
        from train import main

        main(arguments(parts, tmp_path / "whole", max_steps=6))
        main(arguments(parts, tmp_path / "halves", max_steps=6, save_steps=2, save_strategy="steps"))
        for step in (4, 6):  # as a kill would leave them: one cut off while it was written, one never begun
            folder = tmp_path / "halves" / f"checkpoint-{step}"
            (folder / "whole.json").unlink()
        (tmp_path / "halves" / "checkpoint-4" / "trainer_state.json").write_text("{")
        main([*arguments(parts, tmp_path / "halves", max_steps=6, save_steps=2), "--resume"])
        assert losses(tmp_path / "halves") == losses(tmp_path / "whole")

    def test_learning_rates_by_part(self, parts):
        from training_loop import VisualChatTrainingArguments, group_parameters

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
    def test_oldest_rounds_go_first_with_their_images(self, parts):
        from training_data import drop_rounds, measure

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
        from training_data import prepare_rows

        prepared = prepare_rows([str(parts / "data")], make_processor(), max_length=75)
        assert 0 < prepared.too_long[str(parts / "data")] < 20
        assert len(prepared.rows) == 20 - prepared.too_long[str(parts / "data")]
        assert "keep no answer within 75 tokens" in caplog.text

    def test_mixtures(self, parts, tmp_path):
        from training_data import prepare_rows

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

    def test_json_lines_with_paths_of_pictures(self, tmp_path, monkeypatch):
        from training_data import TrainingCollator, prepare_rows

        monkeypatch.chdir(tmp_path)
        Path("pictures").mkdir()
        digit_image(0).save("pictures/cat.jpg")
        readme = (EXAMPLES.parent / "README.md").read_text()
        Path("rows.jsonl").write_text(readme.split("```json\n")[1].split("```")[0])
        rows = prepare_rows(["rows.jsonl"], make_processor(), 512).rows
        batch = TrainingCollator(make_processor())([rows[0]])
        assert batch["pixel_values"].shape == (1, 3, 16, 16)

    def test_a_dataset_of_another_schema_is_named(self, tmp_path):
        from training_data import load_rows

        path = tmp_path / "other.parquet"
        datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(path)
        with pytest.raises(ValueError, match=r"other\.parquet: rows need a column `messages` .* got \['text'\]"):
            load_rows(str(path))
        with pytest.raises(FileNotFoundError, match="there is no data"):
            load_rows(str(tmp_path / "nothing.parquet"))

    def test_a_broken_picture_stops_the_run_or_is_named_and_counted(self, parts, tmp_path, caplog):
        from train import main

        rows = datasets.Dataset.from_parquet(str(parts / "data" / "shard-00000-of-00001.parquet"))
        rows = rows.cast_column("images", datasets.List(datasets.Image(decode=False))).to_list()
        (tmp_path / "bad.png").write_bytes(b"no picture")
        rows[1]["images"] = [{"bytes": None, "path": str(tmp_path / "bad.png")}]
        features = FEATURES.copy()
        features["images"] = datasets.List(datasets.Image(decode=False))
        data = tmp_path / "data.parquet"
        datasets.Dataset.from_list(rows, features=features).to_parquet(data)
        settings = {"datasets": data, "num_train_epochs": 1, "max_steps": -1, "eval_fraction": 0.05}
        with pytest.raises(ValueError, match=r"a row of source 1 .*bad\.png"):
            main(arguments(parts, tmp_path / "stop", **settings))
        metrics = main([*arguments(parts, tmp_path / "go", **settings), "--skip_broken_images"])
        assert metrics["broken_rows"] == 1
        assert "bad.png" in caplog.text
        log = json.loads((tmp_path / "go" / "log.json").read_text())
        assert [entry["broken_rows"] for entry in log][-1] == 1


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
    from modeling_visualchat.data_collator_visualchat import fill_images

    return fill_images(row, "row")


def test_recipes_are_read_and_their_fields_known(parts, tmp_path):
    from train import parse_arguments

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
    from train import main
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


def test_the_tiny_recipe_runs_as_the_readme_says(tmp_path, monkeypatch):
    import make_tiny
    from train import main

    monkeypatch.chdir(tmp_path)
    make_tiny.main(["--rows", "40"])
    words = [str(EXAMPLES / "recipes" / "tiny.yaml"), "--per_device_train_batch_size", "4"]
    metrics = main([*words, "--max_steps", "4", "--eval_steps", "2", "--save_steps", "2", "--generation_samples", "2"])
    assert {"eval_loss", "eval_exact_answers"} <= set(metrics)
    assert list(Path("outputs/tiny/run").glob("**/events.out.tfevents.*"))
    assert AutoModel.from_pretrained("outputs/tiny/run/model").config.image_number_keys
