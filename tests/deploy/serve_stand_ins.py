"""`lorafleet serve` over stand-in processes: `python -m tests.deploy.serve_stand_ins FLAGS...`."""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from lorafleet.deploy import serve
from lorafleet.deploy.launch import Programs

_STAND_IN = (sys.executable, "-m", "tests.deploy.stand_in")


def main() -> int:
    """The real command but for the programs it starts."""
    parser = ArgumentParser()
    serve.add_flags(parser)
    programs = Programs(shard=(*_STAND_IN, "shard"), router=(*_STAND_IN, "router"))
    return serve.run(parser.parse_args(), programs)


if __name__ == "__main__":
    sys.exit(main())
