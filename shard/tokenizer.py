"""The tokenizer files the router asks for, made from whatever the checkpoint ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def tokenizer_json(directory: Path) -> bytes:
    """The checkpoint's `tokenizer.json`, or one converted from its older tokenizer files."""
    path = directory / "tokenizer.json"
    if path.is_file():
        return path.read_bytes()
    from transformers import AutoTokenizer  # heavy, and needed for old checkpoints only

    backend: Any = AutoTokenizer.from_pretrained(directory).backend_tokenizer
    text: str = backend.to_str()
    return text.encode()


def tokenizer_config_json(directory: Path) -> bytes:
    """`tokenizer_config.json` with the chat template of `chat_template.jinja` put back inside."""
    config = _read_json(directory / "tokenizer_config.json")
    for name, token in _read_json(directory / "special_tokens_map.json").items():
        config.setdefault(name, token)
    template = directory / "chat_template.jinja"
    if template.is_file():
        config["chat_template"] = template.read_text()
    return json.dumps(config).encode()


def eos_token_ids(directory: Path, config: Any) -> list[int]:
    """Tokens that end a text: the generation config's, else the model config's."""
    eos = _read_json(directory / "generation_config.json").get("eos_token_id", config.eos_token_id)
    if eos is None:
        return []
    return [eos] if isinstance(eos, int) else list(eos)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
