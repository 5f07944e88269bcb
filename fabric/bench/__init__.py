"""MEASURES. Any OpenAI endpoint."""
