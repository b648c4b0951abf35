"""The OpenAI-compatible HTTP API. Does not import Ray."""
