"""Saved folders load where this package does not exist: in a subprocess that cannot import it."""

import json
import sys
import textwrap

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    Trainer,
    TrainingArguments,
    pipeline,
)

from helpers.elsewhere import CODE_FILES, run_elsewhere
from helpers.tiny import assistant, digit_image, make_inputs, make_model, make_processor, text_part, user
from modeling_visualchat import VisualChatConfig, VisualChatDataCollator, VisualChatForCausalLM, VisualChatProcessor


def save_with_expectations(model, folder, processor=None):
    model.save_pretrained(folder)
    (processor or make_processor()).save_pretrained(folder)
    inputs = make_inputs(["titit", "tt"], model)
    with torch.no_grad():
        logits = model(**inputs).logits
    torch.save({"inputs": inputs, "logits": logits}, folder.parent / "expected.pt")


COMPARE = """
expected = torch.load(root + "/expected.pt")
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(model(**expected["inputs"]).logits, expected["logits"])
"""


CROSS = pytest.param("linear", "cross", marks=pytest.mark.slow)


@pytest.mark.parametrize("projector, attention", [("linear", "mmca"), ("perceiver", "mmca"), CROSS])
def test_save_load_elsewhere_and_save_again(projector, attention, tmp_path):
    model = make_model(image_number_keys=True, projector=projector, num_query_tokens=4, multimodal_attention=attention)
    processor = make_processor()
    processor.image_seq_length = model.config.image_seq_length
    save_with_expectations(model, tmp_path / "first", processor)
    files = {path.name for path in (tmp_path / "first").iterdir()}
    assert CODE_FILES | {"config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"} <= files
    assert {"processor_config.json", "tokenizer.json", "tokenizer_config.json"} <= files

    run_elsewhere(
        """
        for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
            assert type(auto_class.from_pretrained(folder, trust_remote_code=True)).__name__ == "VisualChatForCausalLM"
        assert type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__ == "VisualChatConfig"
        """
        + textwrap.indent(COMPARE, " " * 8)
        + """
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        assert type(processor).__name__ == "VisualChatProcessor"
        assert processor.image_seq_length == model.config.image_seq_length
        assert model.generation_config.suppress_tokens == [model.config.image_token_id]
        model.save_pretrained(root + "/second")
        processor.save_pretrained(root + "/second")
        """,
        cwd=tmp_path,
        root=tmp_path,
        folder=tmp_path / "first",
    )
    assert {path.name for path in (tmp_path / "second").iterdir()} == files
    first, second = (json.loads((tmp_path / k / "config.json").read_text()) for k in ("first", "second"))
    for config in (first, second):  # loading writes the dtype into the sub-configs
        config["text_config"].pop("dtype", None)
        config["vision_config"].pop("dtype", None)
    assert second == first
    assert set(first["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"}
    for name in CODE_FILES:
        assert (tmp_path / "first" / name).read_text() == (tmp_path / "second" / name).read_text()

    run_elsewhere(COMPARE, cwd=tmp_path, root=tmp_path, folder=tmp_path / "second")


def test_saved_keys_are_the_parameters_names(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())


def test_auto_classes_resolve_locally(tmp_path):
    save_with_expectations(make_model(), tmp_path / "model")
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        assert type(auto_class.from_pretrained(tmp_path / "model")) is VisualChatForCausalLM
        assert type(auto_class.from_config(VisualChatConfig.from_pretrained(tmp_path / "model"))) is VisualChatForCausalLM
    assert type(AutoConfig.from_pretrained(tmp_path / "model")) is VisualChatConfig
    assert type(AutoProcessor.from_pretrained(tmp_path / "model")) is VisualChatProcessor


def test_a_trainer_checkpoint_trains_by_the_mode_and_loads_elsewhere(tmp_path):
    model = make_model(image_number_keys=True)
    model.freeze_for_alignment()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    processor = make_processor()
    rows = [
        {"messages": [user("What?", digit_image(k)), assistant("zero"), user("And?", digit_image(k + 1)), assistant("one")]}
        for k in range(4)
    ]
    rows += [{"messages": [{"role": "user", "content": "Hi"}, assistant("Hello")]}] * 2
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_steps=3,
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=VisualChatDataCollator(processor),
        processing_class=processor,
    )
    trainer.train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved == trained

    inputs = make_inputs(["titit", "tt"], model)
    with torch.no_grad():
        torch.save({"inputs": inputs, "logits": model.eval()(**inputs).logits}, tmp_path / "expected.pt")
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert {path.name for path in checkpoint.iterdir()} >= CODE_FILES | {"processor_config.json", "chat_template.jinja"}
    run_elsewhere(
        COMPARE + "AutoProcessor.from_pretrained(folder, trust_remote_code=True)",
        cwd=tmp_path,
        root=tmp_path,
        folder=checkpoint,
    )


def test_a_folder_chats_elsewhere(tmp_path):
    model, processor = make_model(image_number_keys=True), make_processor()
    save_with_expectations(model, tmp_path / "model", processor)
    for k in range(3):
        digit_image(k).save(tmp_path / f"{k}.png")
    session = model.start_chat(processor)
    for question, names in (("What is it?", ["0.png"]), ("And these?", ["1.png", "2.png"])):
        session.send(question, [tmp_path / name for name in names], max_new_tokens=8)
    (tmp_path / "answers.json").write_text(json.dumps([one.answer for one in session.rounds]))

    run_elsewhere(
        """
        import json
        model = AutoModel.from_pretrained(folder, trust_remote_code=True)
        chat = model.start_chat(AutoProcessor.from_pretrained(folder, trust_remote_code=True))
        answers = [
            chat.send("What is it?", "0.png", max_new_tokens=8),
            "".join(chat.send("And these?", ["1.png", "2.png"], stream=True, max_new_tokens=8)),
        ]
        assert answers == json.load(open("answers.json")), answers
        chat.save("saved")
        assert chat.load("saved", model, chat.processor).rounds == chat.rounds
        """,
        cwd=tmp_path,
        folder=tmp_path / "model",
    )


@pytest.mark.parametrize("given", ["folder", "objects"])
def test_image_text_to_text_pipeline(given, tmp_path):
    model, processor = make_model(image_number_keys=True), make_processor()
    messages = [user("What is this?", digit_image(0), digit_image(1))]
    if given == "folder":
        save_with_expectations(model, tmp_path / "model")
        pipe = pipeline("image-text-to-text", model=str(tmp_path / "model"), trust_remote_code=True)
    else:
        pipe = pipeline("image-text-to-text", model=model, processor=processor)
    settings = {"max_new_tokens": 5, "do_sample": False}
    answer = pipe(text=messages, generate_kwargs=settings, return_full_text=False)[0]["generated_text"]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
    assert answer == processor.decode(tokens, skip_special_tokens=True)

    batch = pipe(text=[messages, [user("And this?", digit_image(2))]], generate_kwargs=settings, batch_size=2)
    assert len(batch) == 2
    plain = pipe(images=digit_image(0), text="<image> What?", generate_kwargs=settings)
    assert plain[0]["generated_text"]


def test_traveling_code_imports_nothing_that_stays_behind(tmp_path):
    """What travels is flat and imports siblings, the standard library, and the packages that the model needs."""
    save_with_expectations(make_model(), tmp_path / "model")
    allowed = {*sys.stdlib_module_names, "PIL", "huggingface_hub", "numpy", "safetensors", "torch", "transformers"}
    for path in sorted((tmp_path / "model").glob("*.py")):
        for line in path.read_text().splitlines():
            words = line.split()
            if line.startswith(("import ", "from ")) and not words[1].startswith("."):
                assert words[1].split(".")[0] in allowed, f"{path.name}: {line}"
            elif line.startswith("from ."):
                assert f"{words[1][1:]}.py" in CODE_FILES, f"{path.name}: {line}"


def test_text_part_messages_of_a_table_survive_arrow(tmp_path):
    """Rows that went through a table hold None for every key that another part has."""
    datasets = pytest.importorskip("datasets")
    messages = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A."}]},
    ]
    table = datasets.Dataset.from_list([{"messages": messages, "images": [digit_image(0)]}])
    table = table.cast_column("images", datasets.List(datasets.Image()))
    batch = VisualChatDataCollator(make_processor())([table[0]])
    expected = VisualChatDataCollator(make_processor())(
        [
            {
                "messages": [{"role": "user", "content": [{"type": "image"}, text_part("What?")]}, assistant("A.")],
                "images": [digit_image(0)],
            }
        ]
    )
    assert all(torch.equal(batch[key], expected[key]) for key in expected)
