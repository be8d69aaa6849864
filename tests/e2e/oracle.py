"""What transformers + peft answer, one request at a time, in float32."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


class Oracle:
    """Greedy answers of a checkpoint with any of its adapters."""

    def __init__(self, model: Path, adapter_root: Path, adapters: list[str]) -> None:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._model = PeftModel.from_pretrained(base, adapter_root / adapters[0], adapters[0])
        for name in adapters[1:]:
            self._model.load_adapter(adapter_root / name, name)

    def load_only(self, adapter_root: Path, name: str) -> None:
        """Takes the place of the adapters there are, so that a thousand need no room."""
        held = list(self._model.peft_config)
        if name not in held:
            self._model.load_adapter(adapter_root / name, name)
            self._model.set_adapter(name)
            for other in held:
                self._model.delete_adapter(other)

    @torch.no_grad()
    def answer(self, prompt_ids: list[int], adapter: str | None, max_new_tokens: int) -> list[int]:
        """Token ids after the prompt, the EOS token included when it ends the answer."""
        if adapter is None:
            with self._model.disable_adapter():
                return self._generate(prompt_ids, max_new_tokens)
        self._model.set_adapter(adapter)
        return self._generate(prompt_ids, max_new_tokens)

    def _generate(self, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        ids = torch.tensor([prompt_ids])
        output = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        answer: list[int] = output[0, len(prompt_ids) :].tolist()
        return answer
