"""Settings and batches of the tests of `generate`."""

NEW = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}


LAYOUT = ["tt", "titit", "iitt", "ti", "tiiiit"]
# For cross attention, whose prompts end with text
LAYOUT_ENDING_WITH_TEXT = ["tt", "titit", "iitt", "its", "tiiiit"]


def rows_alone(inputs, layout):
    image = 0
    for row, parts in enumerate(layout):
        kept = inputs["attention_mask"][row].bool()
        images = parts.count("i")
        alone = {
            "input_ids": inputs["input_ids"][row][kept][None],
            "attention_mask": inputs["attention_mask"][row][kept][None],
        }
        if images:
            alone["pixel_values"] = inputs["pixel_values"][image : image + images]
        image += images
        yield alone
