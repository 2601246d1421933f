# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The commands of a chat in the terminal, as `/help` and `visualchat chat --help` print them."""

COMMANDS = """\
/image PATH…       attach images (files or URLs) to the next question; quote names with spaces.
                   <image> in the question, once for each, says where they stand
/retry             ask the last question again
/edit NUMBER TEXT  replace an earlier question; its images stay, later rounds are dropped
/undo              remove the last question and its answer
/show              print the conversation
/save FOLDER       save the conversation and its images
/load FOLDER       continue a saved conversation
/clear             start a new conversation
/help              print this list
/quit              quit (as Ctrl-D does)
Ctrl-C stops the answer that is being generated."""
