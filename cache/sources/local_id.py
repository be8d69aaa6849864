"""The one spelling of a local adapter's id: its path under the adapter root, as lists show it.

An id is also an adapter's identity, so two spellings of one folder would be two adapters, each with
copies, pins and a fair share of its own. Router and shards both go by this, and it looks at no
file: a link under the root is a name of its own, which the operator may point elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

SOURCE = "local"


def local_id(path: str, roots: Sequence[str] = ()) -> str:
    """The id of the folder at `path`, relative to the root or absolute under one of `roots`.

    `roots`: absolute paths of the root. Raises ValueError, with a sentence for the client, for a
    path that leads elsewhere, that has "..", which a link may lead anywhere, and for the root.
    """
    parts = _parts(path)
    if path.startswith("/"):
        parts = _below(parts, roots)
    if not parts or ".." in parts:
        raise ValueError(
            "the id of a local adapter must be its folder's path relative to --adapter-root, "
            'without ".."; an absolute path must begin with the root\'s'
        )
    return "/".join(parts)


def is_local_id(text: str) -> bool:
    """Whether this is an id in its one spelling."""
    try:
        return local_id(text) == text
    except ValueError:
        return False


def _below(parts: list[str], roots: Sequence[str]) -> list[str]:
    """What follows the first root that the path is under; nothing where there is none."""
    for root in map(_parts, roots):
        if parts[: len(root)] == root:
            return parts[len(root) :]
    return []


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]
