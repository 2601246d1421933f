"""An HTTP server that implements the OpenAI API."""
