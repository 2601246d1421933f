"""Conversations for training: from public datasets and your own files to checked, sharded examples."""
