"""The paper's prompt, to the letter."""

# ../shared/DESIGN.md, section 3
DESIGN_PROMPT = """\
<s>You are a powerful vision-language assistant.

### Image 1:
<image>

### Question:
please describe the image.

### Answer:
It's a cute black cat.</s>
### Image 2:
<image>
### Image 3:
<image>

### Question:
What's the difference between the three cats?

### Answer:
"""
