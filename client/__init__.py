"""The place of the Python client; until it is there, any HTTP or OpenAI client will do."""
