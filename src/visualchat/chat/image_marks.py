# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Where the images of a question stand, as people type it and as it is shown: a mark for each image."""

from modeling_visualchat.chat_rounds_visualchat import Round


IMAGE_MARK = "<image>"


def read_marks(text: str, num_images: int) -> list[dict]:
    """
    The parts of a question that was typed: each of its images stands at its mark if there is a mark for each, before the
    text otherwise, and marks are text then. Blanks beside a mark are left out.
    """
    pieces = text.split(IMAGE_MARK)
    if len(pieces) != num_images + 1:
        return [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": text}]
    parts = []
    for index, piece in enumerate(pieces):
        if index > 0:
            parts.append({"type": "image"})
        if piece.strip() or num_images == 0:
            parts.append({"type": "text", "text": piece.strip() if num_images else piece})
    return parts


def write_marks(question: Round) -> str:
    """The text of a question, with a mark on a line of its own for each image if not all of them stand before the text."""
    if not question.image_lines:
        return question.text
    return "\n".join(part.get("text", IMAGE_MARK) for part in question.content)
