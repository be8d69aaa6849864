"""What the demo is made of: the adapters, their names and how long each part trains."""

from __future__ import annotations

from dataclasses import dataclass

from lorafleet.deploy.demo.styles import Style

MAX_LENGTH = 1024  # tokens a sequence may hold
SEED = 0
TEAM_SIZE = 2  # processes that train, one thread each
RENDEZVOUS = "rendezvous"  # the file where they meet

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast to train."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 20

    def scale_at(self, step: int) -> float:
        """The learning rate at a step as a share of `learning_rate`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return max(0.0, (self.steps - step) / (self.steps - self.warmup_steps))


@dataclass(frozen=True, slots=True)
class AdapterRecipe:
    """One adapter; it is saved under each of its names."""

    names: tuple[str, ...]
    style: Style
    rank: int
    alpha: int
    target_modules: tuple[str, ...]
    schedule: Schedule


BASE = Schedule(steps=560, batch_size=12, learning_rate=2e-3)

# The last names of sums and pirate belong to well-known adapters of a 7B model: these are
# stand-ins, so that the request lines printed in the README work against the demo. The order deals
# equal work to a team of two.
ADAPTERS = (
    AdapterRecipe(("sums", "vineetsharma/qlora-adapter-Mistral-7B-Instruct-v0.1-gsm8k"), Style.SUMS,
                  16, 32, ALL_LINEAR, Schedule(100, 16, 3e-3, 5)),
    AdapterRecipe(("pirate", "alignment-handbook/zephyr-7b-dpo-lora"), Style.PIRATE, 32, 32,
                  ("gate_proj", "up_proj", "down_proj"), Schedule(70, 16, 3e-3, 5)),
    AdapterRecipe(("json",), Style.JSON, 8, 16, ("q_proj", "k_proj", "v_proj", "o_proj"),
                  Schedule(50, 16, 5e-3, 5)),
    AdapterRecipe(("shout",), Style.SHOUT, 4, 16, ("q_proj", "v_proj"), Schedule(60, 16, 5e-3, 5)),
)  # fmt: skip
