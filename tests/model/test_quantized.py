"""Models in 8 and 4 bits (torchao, bitsandbytes), on a CPU: logits, a QLoRA step, image memory and chat."""

import copy
import logging
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig, TorchAoConfig

from helpers.chat import GREEDY, PROCESSOR, assert_as_from_scratch, count_work
from helpers.tiny import digit_image, make_inputs, make_model
from modeling_visualchat import chat_visualchat
from modeling_visualchat.image_memory_visualchat import ImageMemoryStore


KINDS = ["torchao int8", "bitsandbytes int8", "bitsandbytes nf4"]
NF4_WIDEST_STEP = 1.0 - 0.6961928  # between its outermost two of 16 values


@pytest.fixture(scope="module", autouse=True)
def portable_kernels():
    """
    On a CPU with AVX512-BF16, bitsandbytes 0.50 packs 4-bit weights for a kernel that ends by a floating point exception for
    layers as narrow as those of tiny models. Its kernels for any CPU are used instead.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
        yield


def quantization(kind: str):
    if kind == "torchao int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if kind == "bitsandbytes int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)  # else the rows of a call depend on each other
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def load(folder, kind: str):
    return AutoModel.from_pretrained(folder, quantization_config=quantization(kind)).eval()


def save(folder, **changes):
    """
    The folder of a tiny model, and the model. `changes` are of its config. The widths of its layers are multiples of 64, a
    block of 4-bit weights: else bitsandbytes 0.50 scales them wrongly on a CPU with AVX512.
    """
    text, vision = {"intermediate_size": 128, **changes.pop("text", {})}, {"hidden_size": 64, "intermediate_size": 128}
    model = make_model(image_number_keys=True, text=text, vision=vision, **changes)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A model in full precision, and its folder."""
    folder = tmp_path_factory.mktemp("full")
    return save(folder), folder


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def quantized(full, kind):
    return load(full[1], kind)


def logits_of(model, inputs, **more) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, **more).logits[inputs["attention_mask"].bool()]


def pictures(number: int) -> torch.Tensor:
    return make_inputs(["i" * number], make_model(), seed=number)["pixel_values"]


def quantized_weights(model) -> dict[str, torch.Tensor]:
    """What the bits stand for, by the name of the layer."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from torchao.quantization import Int8Tensor

    weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Linear8bitLt):
            saved = layer.state_dict()
            weights[name] = saved["weight"].float() * saved["SCB"][:, None] / 127
        elif isinstance(layer, Linear4bit):
            weights[name] = dequantize_4bit(layer.weight, layer.weight.quant_state)
        elif isinstance(layer, nn.Linear) and isinstance(layer.weight, Int8Tensor):
            weights[name] = layer.weight.dequantize()
    return weights


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


class TestLogits:
    def test_every_weight_is_the_nearest_step(self, full, quantized, kind):
        weights = quantized_weights(quantized)
        linear = {name for name, part in full[0].named_modules() if isinstance(part, nn.Linear)}
        assert set(weights) == linear - {"lm_head"}
        for name, found in weights.items():
            expected = full[0].get_submodule(name).weight.detach()
            if kind.endswith("int8"):
                half_step = expected.abs().amax(-1, keepdim=True) / 127 / 2
            else:  # of blocks of 64, whose largest numbers have 8 bits themselves, at worst 1/127 of the largest of them off
                blocks = expected.abs().flatten().unflatten(0, (-1, 64))
                largest = blocks.amax(-1, keepdim=True) + blocks.max() / 127
                half_step = (largest * NF4_WIDEST_STEP / 2 + blocks.max() / 127).expand(-1, 64).reshape(expected.shape)
            # bitsandbytes rounds to 16 bits before
            assert ((found - expected).abs() <= half_step + expected.abs() * 2**-11 + 1e-6).all(), name

    def test_logits_are_those_of_the_numbers_that_the_bits_stand_for(self, full, quantized, kind):
        model = copy.deepcopy(full[0])
        with torch.no_grad():
            for name, weight in quantized_weights(quantized).items():
                model.get_submodule(name).weight.copy_(weight)
        inputs = make_inputs(["titit", "tt"], model)
        expected = logits_of(model, inputs)
        if kind == "bitsandbytes int8":
            # Activations are rounded too, but not while training on a CPU. Where one is near the middle of a step, the least
            # difference rounds it otherwise: what is bounded is the sum of the roundings, each of a 127th of the largest
            rounding = 1 / 127 / math.sqrt(12) * math.sqrt(96)  # of a row of 96 numbers with a single one that is not zero
            assert relative_error(logits_of(quantized, inputs), expected) < rounding * len(quantized_weights(quantized))
            quantized.train()
        try:
            torch.testing.assert_close(logits_of(quantized, inputs), expected, atol=1e-4, rtol=1e-4)
        finally:
            quantized.eval()

    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.endswith("int8")], indirect=True)
    def test_8_bits_are_near_the_full_model(self, full, quantized, kind):
        """What each layer is off by, relative to what it computes, at worst adds up. In 4 bits it is too much."""
        inputs = make_inputs(["titit", "tt"], full[0])
        weights = quantized_weights(quantized)
        errors = [relative_error(weight, full[0].get_submodule(name).weight) for name, weight in weights.items()]
        bound = sum(errors) * (2 if kind == "bitsandbytes int8" else 1)  # activations have the same steps
        assert bound < 0.5
        assert relative_error(logits_of(quantized, inputs), logits_of(full[0], inputs)) < bound


def test_a_qlora_step_moves_the_adapters_and_nothing_else(full, kind):
    model = load(full[1], kind)
    memory = model.encode_images(pictures(1))
    if kind != "torchao int8":
        model = prepare_model_for_kbit_training(model)
    layers = r".*language_model\.layers\..*_proj"
    model = get_peft_model(model, LoraConfig(r=4, target_modules=layers, init_lora_weights=False))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 3 * 7 * 2 and all("lora_" in name for name in trained)
    model.train()
    inputs = make_inputs(["titit", "tt"], full[0])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    optimizer.step()
    after = model.state_dict()
    assert set(after) == set(before)
    assert {name for name, value in before.items() if not same(after[name], value)} == trained
    with torch.no_grad():
        assert model(**inputs, labels=labels).loss < loss
    with pytest.raises(ValueError, match="made with other weights"):
        model(**{name: value[:1] for name, value in inputs.items() if name != "pixel_values"}, image_memory=[memory, memory])


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if type(one) is not torch.Tensor:  # torchao's
        parts = one.__tensor_flatten__()[0]
        return all(torch.equal(getattr(one, part), getattr(other, part)) for part in parts)
    return torch.equal(one, other)


class TestImageMemory:
    def test_it_equals_pixel_values(self, full, quantized, kind):
        inputs = make_inputs(["titit", "tt"], full[0])
        expected = logits_of(quantized, inputs)
        memory = quantized.encode_images(inputs.pop("pixel_values"))
        text = inputs["input_ids"] != full[0].config.image_token_id
        is_text = text[inputs["attention_mask"].bool()]
        found = logits_of(quantized, inputs, image_memory=memory)
        torch.testing.assert_close(found[is_text], expected[is_text], atol=1e-4, rtol=1e-4)

    def test_it_knows_a_model_that_is_loaded_again(self, full, quantized, kind, tmp_path):
        memory = quantized.encode_images(pictures(1))
        assert load(full[1], kind).encode_images(pictures(1)).fingerprint == memory.fingerprint
        quantized.save_pretrained(tmp_path)
        assert AutoModel.from_pretrained(tmp_path).image_fingerprint() == memory.fingerprint

    @pytest.mark.parametrize("factor", [2.0, 1.5])
    def test_other_weights_of_the_same_bits_have_another_fingerprint(self, full, quantized, kind, factor, tmp_path):
        """A weight that is twice as large differs in the scale of its steps alone."""
        other = copy.deepcopy(full[0])
        with torch.no_grad():
            other.model.language_model.layers[0].mlp.up_proj.weight.mul_(factor)
        other.save_pretrained(tmp_path)
        assert load(tmp_path, kind).image_fingerprint() != quantized.image_fingerprint()

    def test_scales_that_change_in_place_are_noticed(self, full, kind):
        model = load(full[1], kind)
        memory = model.encode_images(pictures(1))
        layer = model.model.language_model.layers[1].mlp.down_proj
        if kind == "torchao int8":
            scales = layer.weight.scale
        else:
            scales = layer.state.SCB if kind == "bitsandbytes int8" else layer.weight.quant_state.state2.absmax
        scales.mul_(2)
        with pytest.raises(ValueError, match="made with other weights"):
            model(input_ids=make_inputs(["tit"], model)["input_ids"], image_memory=memory)

    def test_a_model_that_settles_in_its_first_pass_accepts_what_it_made_in_it(self, tmp_path):
        """bitsandbytes brings biases to the dtype of the computation when they are first added."""
        save(tmp_path, text={"attention_bias": True})
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
        model = AutoModel.from_pretrained(tmp_path, quantization_config=config).eval()
        inputs = make_inputs(["tit"], model)
        memory = model.encode_images(inputs.pop("pixel_values"))
        assert logits_of(model, inputs, image_memory=memory).isfinite().all()
        store = ImageMemoryStore(AutoModel.from_pretrained(tmp_path, quantization_config=config).eval(), 2**30)
        assert len({store.get(pictures(1))[0].fingerprint for _ in range(3)} | {memory.fingerprint}) == 1
        assert store.hits == 1  # what was made before it settled is not asked for again


def test_chat_answers_as_generate(quantized):
    session = quantized.start_chat(PROCESSOR)
    for question, images, new in (("What is it?", [1], 1), ("And these?", [1, 2], 1), ("More.", [], 0)):
        with count_work(quantized) as work:
            session.send(question, [digit_image(k) for k in images], **GREEDY)
        assert work["pictures"] == new  # what it has seen, it remembers
        assert_as_from_scratch(session)


def packed(model, dtype=torch.qint8):
    """Weights in packed objects, which are neither parameters nor buffers."""
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=dtype)


@pytest.mark.filterwarnings("ignore:.*deprecated")
class TestWeightsThatCannotBeRead:
    @pytest.fixture
    def other(self, full):
        model = copy.deepcopy(full[0])
        with torch.no_grad():
            model.model.language_model.layers[0].mlp.up_proj.weight.mul_(-2)
        return packed(model)

    @pytest.fixture
    def model(self, full):
        return packed(full[0])

    def test_they_have_no_fingerprint_and_no_image_memory(self, model, full):
        reason = r"Image memory needs weights that can be read, but vision_tower\..* is a torch\.ao\..*Linear"
        for ask in (model.image_fingerprint, lambda: model.encode_images(pictures(1))):
            with pytest.raises(ValueError, match=reason):
                ask()
        inputs = make_inputs(["tit"], full[0])
        memory = full[0].encode_images(inputs.pop("pixel_values"))
        with pytest.raises(ValueError, match=reason):
            model(**inputs, image_memory=memory)

    @pytest.mark.parametrize("dtype", [torch.qint8, torch.float16], ids=str)
    def test_chat_computes_without_and_says_so_once(self, full, dtype, caplog):
        logging.Logger.warning_once.cache_clear()
        model = packed(full[0], dtype)
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                session = model.start_chat(PROCESSOR)
                for question, images in (("What is it?", [1]), ("And these?", [1, 2]), ("More.", [])):
                    with count_work(model) as work:
                        session.send(question, [digit_image(k) for k in images], **GREEDY)
                    assert work["pictures"] == len(images)
                    # In 8 bits, activations have the steps of the largest number of a call: later rounds are other calls
                    if dtype == torch.float16 or len(session.rounds) == 1:
                        assert_as_from_scratch(session)
        said = [record.getMessage() for record in caplog.records if record.name == chat_visualchat.__name__]
        assert len(said) == 1
        assert said[0].startswith(
            "Conversations go on without image memory, which needs weights that can be read, but model."
        )

    def test_a_round_costs_its_new_tokens_and_other_weights_begin_anew(self, model, other):
        session = model.start_chat(PROCESSOR)
        session.send("What is it?", digit_image(1), **GREEDY)
        with count_work(model) as work:
            session.send("And?", **GREEDY)
        assert work["rows"] < len(session.tokenize(session.rounds)[0])
        model.model.language_model.layers = other.model.language_model.layers
        session.send("And now?", **GREEDY)
        assert_as_from_scratch(session)

    def test_tensors_that_are_not_plain(self, full, caplog):
        logging.Logger.warning_once.cache_clear()
        model = copy.deepcopy(full[0])
        layer = model.model.language_model.layers[1].mlp.up_proj
        layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr(), requires_grad=False)
        with pytest.raises(
            ValueError, match=r"layers\.1\.mlp\.up_proj\.weight is a Parameter .*sparse_csr.*not a plain tensor"
        ):
            model.image_fingerprint()
        session = model.start_chat(PROCESSOR)
        session.send("What is it?", digit_image(1), **GREEDY)
        assert_as_from_scratch(session)

    def test_a_layer_that_refuses_to_be_saved(self, full):
        class Unsaved(nn.Linear):
            def _save_to_state_dict(self, *args):
                raise NotImplementedError

        model = copy.deepcopy(full[0])
        model.model.language_model.layers[2].mlp.up_proj.__class__ = Unsaved
        with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj is a test_quantized\.Unsaved"):
            model.image_fingerprint()
