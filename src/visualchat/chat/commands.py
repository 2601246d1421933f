# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The commands of a chat in the terminal, as `/help` and `visualchat chat --help` print them."""

COMMANDS = """\
/image PATH…       attach pictures (files or URLs) to the next question; quote names with spaces
/retry             ask the last question again
/edit NUMBER TEXT  ask another question in place of an earlier one, about the same pictures
/undo              take back the last question and its answer
/show              print the conversation
/save FOLDER       write the conversation and its pictures
/load FOLDER       go on with a conversation that was saved
/clear             begin a new conversation
/help              print this
/quit              leave, as Ctrl-D does
Ctrl-C stops an answer."""
