"""A chat in the terminal and on a web page."""
