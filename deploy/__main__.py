"""`python -m lorafleet.deploy` is the `lorafleet` command."""

from __future__ import annotations

import sys

from lorafleet.deploy.cli import main

sys.exit(main())
