"""MergedSource: adapters made here of others, as peft's `LoraModel.add_weighted_adapter` does.

The result is an adapter's directory like any other, in the disk tier: quota, restarts and the
ranks of one machine share it as they share a download.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import torch

from lorafleet.cache.disk_tier import DiskTier, Download
from lorafleet.cache.errors import AdapterNotFound, AdapterUnservable, SourceUnavailable, shown
from lorafleet.cache.layout import ModelLayout
from lorafleet.cache.merging.member import MemberChanged, MergeMember
from lorafleet.cache.merging.merge import Merge
from lorafleet.cache.merging.recipe import SOURCE, MergeRecipe, members_of
from lorafleet.cache.sources import local
from lorafleet.cache.sources.downloads import Downloads
from lorafleet.cache.sources.source import AdapterSource, Progress
from lorafleet.cache.sources.transfer import disk_faults
from lorafleet.proto.messages import AdapterKey

_FORMAT = 1  # of what is written; another one is made anew
_ATTEMPTS = 3  # to merge members that hold still meanwhile


class MergedSource(Downloads):
    """`id` is a recipe (cache/merging/recipe.py). Whoever may use all members may use the merge."""

    def __init__(
        self,
        disk: DiskTier,
        sources: Mapping[str, AdapterSource],
        layout: ModelLayout,
        allow_pickles: bool,
        base_tokenizer: bytes = b"",
    ) -> None:
        """`sources`: where members come from, by name.

        `base_tokenizer`: the base model's tokenizer.json, which a merge is spoken to with; empty
        where it is not known, and then members' are not looked at.
        """
        super().__init__(disk, SOURCE)
        self._base_tokenizer = base_tokenizer
        self._sources, self._layout, self._allow_pickles = sources, layout, allow_pickles
        self._work = Lock()  # one merge at a time, and on one core: the others are for steps

    def fetch(
        self, key: AdapterKey, api_token: str, progress: Progress, refresh: bool = False
    ) -> Path:
        """Fetches the members as this caller, and merges them unless that is done already.

        The members are taken as they are held, with `refresh` too.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._fetch(key, api_token, progress)
            except MemberChanged as error:  # or it was evicted, and is fetched again
                if attempt == _ATTEMPTS:
                    raise SourceUnavailable(str(error)) from None
        raise AssertionError("the last attempt returns or raises")

    def _fetch(self, key: AdapterKey, api_token: str, progress: Progress) -> Path:
        recipe = _recipe(key)
        found = {
            member: self._read_member(str(member), self._fetch_member(member, api_token, progress))
            for member in members_of(key)
        }
        merge = Merge(recipe, [found[member.key] for member in recipe.members], self._layout)
        download = self._download(key, merge, found)
        with self._disk.lock(key):
            if self._disk.get(key) != download:
                self._disk.put(download, lambda aside: self._write(merge, aside, progress))
        return self._disk.path(key)

    def authorize(self, key: AdapterKey, api_token: str) -> None:
        """Every member's source decides; a member that is not here any more is fetched again."""
        for member in members_of(key):
            self._fetch_member(member, api_token, lambda _: None)

    def _read_member(self, name: str, directory: Path) -> MergeMember:
        member = MergeMember.read(name, directory, self._layout, self._allow_pickles)
        if self._base_tokenizer:
            member.check_tokenizer(self._base_tokenizer)
        return member

    def _fetch_member(self, member: AdapterKey, api_token: str, progress: Progress) -> Path:
        source = self._sources.get(member.source)
        if source is None:
            raise AdapterNotFound(
                f"There is no adapter source {shown(member.source)}; it must be one of "
                f"{', '.join(self._sources)}."
            )
        return source.fetch(member, api_token, progress)

    def _download(
        self, key: AdapterKey, merge: Merge, members: Mapping[AdapterKey, MergeMember]
    ) -> Download:
        """As restricted as its members; its commit names their content and what is made of it."""
        copies = {member: self._disk.get(member) for member in members}
        states = [
            copy.commit if copy is not None and copy.commit else str(members[member].spec.states)
            for member, copy in copies.items()
        ]
        is_restricted = any(
            member.source != local.SOURCE and (copy is None or copy.is_restricted)
            for member, copy in copies.items()
        )
        commit = hashlib.sha256(json.dumps([_FORMAT, key.id, states]).encode()).hexdigest()
        return Download(key, commit, merge.nbytes, is_restricted)

    def _write(self, merge: Merge, directory: Path, progress: Progress) -> int:
        with self._work, _one_core(), disk_faults("the merged adapter"):
            return merge.write(directory, progress)


@contextmanager
def _one_core() -> Iterator[None]:
    """This thread, and those begun meanwhile, compute on one core; no other is touched."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _recipe(key: AdapterKey) -> MergeRecipe:
    if key.revision:
        raise AdapterUnservable("A merged adapter has no revisions; its members may.")
    try:
        return MergeRecipe.parse(key.id)
    except ValueError as error:
        sentence = str(error)
        raise AdapterUnservable(f"{sentence[:1].upper()}{sentence[1:]}.") from None
