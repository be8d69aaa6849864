"""What a part found, as a file `PART-SHAPE.json` in the out folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """One part over one shape; `seconds` is what it took, `copy_bandwidth` is in bytes/s."""

    part: str
    shape: str
    device: str
    torch: str
    copy_bandwidth: float
    seconds: float
    rows: list[Row]

    def write(self, folder: Path) -> None:
        """Writes it under its name."""
        text = json.dumps(asdict(self), indent=1)
        (folder / f"{self.part}-{self.shape}.json").write_text(text + "\n")


def read_reports(folder: Path) -> list[Report]:
    """Every report of a folder, by name; other files are passed over."""
    found = []
    for file in sorted(folder.glob("*.json")):
        body = json.loads(file.read_text())
        if isinstance(body, dict) and body.keys() >= Report.__dataclass_fields__.keys():
            found.append(Report(**{name: body[name] for name in Report.__dataclass_fields__}))
    return found


def find_row(reports: Sequence[Report], part: str, shape: str, **fields: object) -> Row | None:
    """The first row of a part that has these fields, or None."""
    for report in reports:
        if (report.part, report.shape) == (part, shape):
            for row in report.rows:
                if all(row.get(name) == value for name, value in fields.items()):
                    return row
    return None
