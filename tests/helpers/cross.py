"""The definition of cross attention, written out token by token, apart from the code that it judges."""

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from helpers.modality import DOUBLE
from helpers.tiny import TOKENS_PER_IMAGE


def norm(states, module):
    return states / (states.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt() * module.weight


def naive_softmax(query_D, keys, values, scaling):
    """What one query of one head sees of a list of keys; nothing of an empty one."""
    if not keys:
        return torch.zeros_like(query_D)
    weights = torch.stack([query_D @ key for key in keys]).mul(scaling).softmax(0)
    return sum(weight * value for weight, value in zip(weights, values))


def naive_look(block, states_TC, images, numbers_NC, seen):
    """
    Cross attention by its definition, token by token and head by head.

    Args:
        block: The module, for its weights.
        states_TC: Of the text tokens of one conversation.
        images: The projected features of its images, each of shape `(tokens, C)`.
        numbers_NC: Embeddings of the numbers, or `None`.
        seen: How many images stand before each text token.
    """
    heads, groups = block.q_proj.out_features // block.head_dim, block.k_proj.out_features // block.head_dim
    keys, values = [], []
    for index, image in enumerate(images):
        image = norm(image, block.image_norm)
        key = image @ block.k_proj.weight.T
        if numbers_NC is not None:
            key = key + norm(numbers_NC[index], block.image_norm) @ block.k_proj.weight.T
        keys.append(key.unflatten(-1, (groups, -1)))
        values.append((image @ block.v_proj.weight.T).unflatten(-1, (groups, -1)))
    output = []
    for state, count in zip(states_TC, seen):
        query = (norm(state, block.query_norm) @ block.q_proj.weight.T).unflatten(-1, (heads, -1))
        of_heads = []
        for head in range(heads):
            group = head * groups // heads
            own_keys = [token for image in keys[:count] for token in image[:, group]]
            own_values = [token for image in values[:count] for token in image[:, group]]
            of_heads.append(naive_softmax(query[head], own_keys, own_values, block.head_dim**-0.5))
        output.append(torch.cat(of_heads) @ block.o_proj.weight.T)
    return torch.tanh(block.gate) * torch.stack(output)


def naive_attention(attention, states_TC, rotary):
    """Plain causal attention over the text tokens of one conversation, token by token and head by head."""
    length, size = len(states_TC), attention.head_dim
    q, k, v = (
        (states_TC @ projection.weight.T).view(1, length, -1, size).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    (q,), (k,) = apply_rotary_pos_emb(q, k, *rotary)
    heads, groups, output = len(q), len(k), []
    for i in range(length):
        of_heads = []
        for head in range(heads):
            group = head * groups // heads
            of_heads.append(naive_softmax(q[head, i], list(k[group, : i + 1]), list(v[0, group, : i + 1]), size**-0.5))
        output.append(torch.cat(of_heads))
    return torch.stack(output) @ attention.o_proj.weight.T


@torch.no_grad()
def naive_logits(model, input_ids, positions, images):
    """
    The logits of the text tokens of one conversation, of shape `(text tokens, vocabulary)`.

    Args:
        model: A model with cross attention over a LLaMA.
        input_ids: Of shape `(tokens,)`, without padding.
        positions: Of the same shape.
        images: The pixels of its images.
    """
    decoder, config = model.model.language_model, model.config
    is_text = input_ids != config.image_token_id
    seen = ((~is_text).cumsum(0)[is_text] // config.image_seq_length).tolist()
    states = decoder.embed_tokens.weight[input_ids[is_text]]
    rotary = decoder.rotary_emb(states, positions[is_text][None])
    features = list(model.get_image_features(images).pooler_output) if len(images) else []
    numbers = None
    if config.image_number_keys:
        numbers = torch.stack([decoder.embed_tokens.weight[ids].mean(0) for ids in config.image_number_token_ids])
    for layer in decoder.layers:
        if layer.cross_attn is not None:
            states = states + naive_look(layer.cross_attn, states, features, numbers, seen)
        states = states + naive_attention(layer.self_attn, norm(states, layer.input_layernorm), rotary)
        states = states + layer.mlp(norm(states, layer.post_attention_layernorm))
    return norm(states, decoder.norm) @ model.lm_head.weight.T


def assert_is_the_definition(model, inputs, logits):
    """Row by row, of the text tokens that are no padding."""
    pixels = iter(inputs.get("pixel_values", ()))
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"].bool())):
        ids, positions = ids[mask], mask.nonzero()[:, 0]
        is_text = ids != model.config.image_token_id
        images = [next(pixels).to(DOUBLE) for _ in range(int((~is_text).sum()) // TOKENS_PER_IMAGE)]
        if is_text.any():
            expected = naive_logits(model, ids, positions, torch.stack(images) if images else [])
            torch.testing.assert_close(logits[row][mask][is_text], expected, atol=1e-8, rtol=1e-8)
