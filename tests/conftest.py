"""What every test starts from: no flag set by the machine's environment, one thread per process."""

from __future__ import annotations

import os
from dataclasses import fields

from lorafleet.router.config import RouterConfig
from lorafleet.shard.config import ShardConfig

for _field in (*fields(ShardConfig), *fields(RouterConfig)):
    os.environ.pop(_field.name.upper(), None)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, when torch is first imported
os.environ.setdefault("MKL_NUM_THREADS", "1")
