"""`visualchat train`: what each mode trains, and what it starts from."""

import json

import datasets
import pytest
import torch
from transformers import AutoModel, AutoProcessor, LlamaForCausalLM, Qwen2ForCausalLM
from transformers.utils import is_torchvision_available

from helpers.chat_templates import make_decoder_tokenizer
from helpers.gguf_files import write_gguf
from helpers.tiny import (
    IMAGE_SIZE,
    digit_image,
    make_config,
    make_image_processor,
    make_model,
    make_processor,
    make_tokenizer,
    make_tower_config,
)
from helpers.training import ALIGNMENT, FEATURES, arguments, make_row, moved
from helpers.versions import needs_transformers
from visualchat.cli import main as visualchat
from visualchat.data.prepare import load_requirements
from visualchat.training import recipe, train
from visualchat.training.arguments import ModelArguments
from visualchat.training.joining import join_parts, prepare_processor
from visualchat.training.train import main
from visualchat.training.trainer import VisualChatTrainingArguments, group_parameters


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

        visualchat(["merge", str(tmp_path / "model"), "--output", str(tmp_path / "merged")])
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


class TestCrossAttention:
    """Its new blocks train with the projector in every mode."""

    @pytest.fixture
    def words(self, parts, tmp_path):
        make_model(multimodal_attention="cross").save_pretrained(tmp_path / "cross")
        make_processor().save_pretrained(tmp_path / "cross")
        settings = {"model_name_or_path": tmp_path / "cross", "train_embedding": False, "learning_rate": 1e-2}
        return arguments(parts, tmp_path / "run", **settings)

    def test_alignment(self, words, tmp_path):
        main(words)
        before = AutoModel.from_pretrained(tmp_path / "cross").state_dict()
        after = AutoModel.from_pretrained(tmp_path / "run" / "model").state_dict()
        assert moved(before, after) == {name for name in before if "multi_modal_projector" in name or "cross_attn" in name}

    def test_its_gates_and_norms_do_not_decay(self):
        model = make_model(multimodal_attention="cross")
        model.freeze_for_alignment()
        settings = VisualChatTrainingArguments(output_dir="unused", use_cpu=True, weight_decay=0.1)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        decay = {
            names[id(one)]: group["weight_decay"] for group in group_parameters(model, settings) for one in group["params"]
        }
        of_block = {name.split("cross_attn.")[1]: rate for name, rate in decay.items() if "layers.0.cross_attn" in name}
        matrices = {f"{letter}_proj.weight": 0.1 for letter in "qkvo"}
        assert of_block == {"gate": 0.0, "query_norm.weight": 0.0, "image_norm.weight": 0.0, **matrices}

    def test_lora_is_added_to_the_decoders_own_projections_alone(self, words, tmp_path):
        main([*words, "--mode", "lora"])
        visualchat(["merge", str(tmp_path / "run" / "model"), "--output", str(tmp_path / "merged")])
        before = AutoModel.from_pretrained(tmp_path / "cross").state_dict()
        changed = moved(before, AutoModel.from_pretrained(tmp_path / "merged").state_dict())
        new = {name for name in before if "multi_modal_projector" in name or "cross_attn" in name}
        assert new <= changed
        assert {name.split(".")[4] for name in changed - new} == {"self_attn", "mlp"}

    def test_joining_by_a_recipes_fields(self, parts, words, tmp_path):
        model = make_model(text={"vocab_size": 320}, image_token_id=5)
        model.model.vision_tower.save_pretrained(tmp_path / "tower")
        make_processor().image_processor.save_pretrained(tmp_path / "tower")
        LlamaForCausalLM(model.config.text_config).save_pretrained(tmp_path / "decoder")
        make_processor().tokenizer.save_pretrained(tmp_path / "decoder")
        where = words.index("--model_name_or_path")
        joined = ["--vision_name_or_path", str(tmp_path / "tower"), "--text_name_or_path", str(tmp_path / "decoder")]
        cross = ["--multimodal_attention", "cross", "--cross_attention_every", "3", "--image_number_keys", "True"]
        main([*words[:where], *words[where + 2 :], *joined, *cross, "--max_steps", "2"])
        trained = AutoModel.from_pretrained(tmp_path / "run" / "model")
        blocks = [layer.cross_attn for layer in trained.model.language_model.layers]
        assert blocks[:2] == [None, None] and blocks[2].gate.item() != 0
        assert trained.config.image_prefix_ids is None


class TestQuantized:
    def test_4_bits_for_the_decoders_layers_alone(self, parts, tmp_path, monkeypatch):
        from transformers.quantizers.quantizers_utils import should_convert_module

        given = {}

        def from_pretrained(name, **kwargs):
            given.update(kwargs)
            return make_model()

        monkeypatch.setattr(AutoModel, "from_pretrained", from_pretrained)
        model_args, _, training_args = train.parse_arguments(arguments(parts, tmp_path, mode="lora", load_in_4bit=True))
        train.prepare_model(model_args, training_args)
        config = given["quantization_config"]
        assert config.load_in_4bit
        assert (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
        linear = {name for name, module in make_model().named_modules() if isinstance(module, torch.nn.Linear)}
        quantized = {name for name in linear if should_convert_module(name, config.llm_int8_skip_modules)}
        assert quantized == {name for name in linear if name.startswith("model.language_model.layers.")}
        assert linear - quantized > {"lm_head", "model.multi_modal_projector.linear"}

    def test_without_bitsandbytes_it_is_named_before_any_work_starts(self, parts, tmp_path, monkeypatch):
        monkeypatch.setattr(recipe, "is_bitsandbytes_available", lambda: False)
        with pytest.raises(ImportError, match="load_in_4bit needs bitsandbytes: pip install"):
            train.main(arguments(parts, tmp_path / "run", mode="lora", load_in_4bit=True))
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "answers_only", [False, pytest.param(True, marks=needs_transformers("5.18", "TRL refuses images with it"))]
)
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


def test_joining_a_tower_and_a_decoder(parts, tmp_path):

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
    assert trained.config.multimodal_attention == "mmca_merged"
    assert trained.config.image_prefix_ids == make_processor().image_prefix_ids()
    main([*words[:where], *words[where + 2 :], "--image_prefix", "none", "--max_steps", "1", "--overwrite", "True"])
    assert AutoModel.from_pretrained(tmp_path / "run" / "model").config.image_prefix_ids is None


def test_joining_a_decoder_from_a_gguf_file(parts, tmp_path):
    model = make_model(decoder="qwen2", text={"vocab_size": len(make_tokenizer())}, image_token_id=5)
    model.model.vision_tower.save_pretrained(tmp_path / "tower")
    make_processor().image_processor.save_pretrained(tmp_path / "tower")
    (tmp_path / "decoder").mkdir()
    write_gguf(tmp_path / "decoder" / "tiny.gguf", Qwen2ForCausalLM(model.config.text_config), make_tokenizer())
    joined = {"vision_name_or_path": tmp_path / "tower", "text_name_or_path": tmp_path / "decoder"}
    words = arguments(parts, tmp_path / "run", **joined, text_gguf_file="tiny.gguf")
    where = words.index("--model_name_or_path")
    words = [
        *words[:where],
        *words[where + 2 :],
        "--max_steps",
        "2",
        "--learned_image_numbers",
        "4",
        "--number_learning_rate",
        "0.01",
    ]
    main([*words, "--train_embedding", "False"])
    trained = AutoModel.from_pretrained(tmp_path / "run" / "model")
    assert trained.config.text_config.model_type == "qwen2"
    joined = AutoModel.from_pretrained(tmp_path / "run" / "joined").state_dict()
    assert {name.split(".")[-2] for name in moved(joined, trained.state_dict())} == {"linear", "layer_norm", "image_numbers"}
    assert AutoProcessor.from_pretrained(tmp_path / "run" / "model").image_token_id == trained.config.image_token_id


def test_joining_a_decoder_with_its_own_chat_template(parts, tmp_path):

    tokenizer = make_decoder_tokenizer("Qwen2")
    model = make_model(text={"vocab_size": len(tokenizer)}, image_token_id=5)
    model.model.vision_tower.save_pretrained(tmp_path / "tower")
    make_processor().image_processor.save_pretrained(tmp_path / "tower")
    decoder = LlamaForCausalLM(model.config.text_config)
    decoder.generation_config.eos_token_id = 2
    decoder.save_pretrained(tmp_path / "decoder")
    tokenizer.save_pretrained(tmp_path / "decoder")
    words = arguments(
        parts, tmp_path / "run", vision_name_or_path=tmp_path / "tower", text_name_or_path=tmp_path / "decoder"
    )
    where = words.index("--model_name_or_path")
    words = [*words[:where], *words[where + 2 :], "--chat_format", "decoder", "--max_steps", "2"]
    prefix = "<|im_start|>user\nImage:"
    main([*words, "--image_number_keys", "True", "--image_prefix", prefix])
    trained = AutoModel.from_pretrained(tmp_path / "run" / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "run" / "model")
    assert processor.chat_format == "decoder" and "Image " in processor.chat_template
    assert trained.config.image_number_token_ids == processor.image_number_token_ids()
    assert trained.config.image_prefix_ids[0] == processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert processor.tokenizer.decode(trained.config.image_prefix_ids) == prefix
    main([*words, "--image_prefix", "auto", "--overwrite", "True"])
    trained = AutoModel.from_pretrained(tmp_path / "run" / "model")
    assert trained.config.image_prefix_ids == processor.image_prefix_ids()
    end_tokens = {2, processor.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert set(trained.generation_config.eos_token_id) == end_tokens
    make_processor().tokenizer.save_pretrained(tmp_path / "decoder")  # the paper's template
    with pytest.raises(ValueError, match="chat_format='decoder' cannot use the tokenizer's chat template"):
        main([*words, "--overwrite", "True"])


def test_parts_of_other_families_are_refused_before_any_work_starts(parts, tmp_path):

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
    with pytest.raises(
        ValueError,
        match=r"decoder holds a model of the type 'llama', not 'visualchat'\. To join a tower and a decoder, give",
    ):
        main(arguments(parts, tmp_path / "run", model_name_or_path=tmp_path / "decoder"))


def test_a_joined_model_takes_image_processor_and_size_of_the_towers_folder(tmp_path):
    from transformers import BitImageProcessorPil, LlamaForCausalLM

    AutoModel.from_config(make_tower_config("dinov2", image_size=40)).save_pretrained(tmp_path / "tower")
    make_image_processor("dinov2").save_pretrained(tmp_path / "tower")
    LlamaForCausalLM(make_config().text_config).save_pretrained(tmp_path / "decoder")
    make_processor().tokenizer.save_pretrained(tmp_path / "decoder")
    parts = {"vision_name_or_path": str(tmp_path / "tower"), "text_name_or_path": str(tmp_path / "decoder")}
    args = ModelArguments(**parts, projector="pixel_shuffle")
    processor = prepare_processor(args)
    assert type(processor.image_processor) is BitImageProcessorPil
    join_parts(args, processor, tmp_path / "joined")
    model, processor = AutoModel.from_pretrained(tmp_path / "joined"), AutoProcessor.from_pretrained(tmp_path / "joined")
    assert model.config.image_size == [IMAGE_SIZE, IMAGE_SIZE]
    assert processor.image_seq_length == model.config.image_seq_length == 1
    inputs = processor(text="<image>What?", images=[digit_image(0)], return_tensors="pt")
    assert model(**inputs).logits.isfinite().all()
    # The tower alone says how `visualchat prepare` checks images
    assert load_requirements(parts["vision_name_or_path"]).shorter_edge == IMAGE_SIZE + 4

    if not is_torchvision_available():
        (tmp_path / "tower/preprocessor_config.json").write_text('{"image_processor_type": "DINOv3ViTImageProcessor"}')
        with pytest.raises(ValueError, match=r"the image processor of .*tower cannot be loaded: .*[Tt]orchvision"):
            prepare_processor(args)

    args.pixel_shuffle_factor = 3
    with pytest.raises(ValueError, match=r"`pixel_shuffle_factor` is 3, which does not divide .* 2 × 2 patches"):
        join_parts(args, processor, tmp_path / "undivided")
