"""The OpenAI-compatible HTTP API. No Ray."""
