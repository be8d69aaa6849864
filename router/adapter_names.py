"""AdapterNames: what adapters are called on this service, and the keys that stand for the names."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lorafleet.cache.merging import recipe
from lorafleet.cache.sources import local_id
from lorafleet.proto.messages import AdapterKey, ShardInfo
from lorafleet.router.aliases import Aliases
from lorafleet.router.config import RouterConfig


@dataclass(frozen=True, slots=True)
class AdapterNames:
    """Makes keys of ids; however people spell an id, an adapter has one key."""

    default_source: str
    roots: tuple[str, ...]  # absolute paths of the shards' adapter root; none where there is none
    aliases: Aliases

    @classmethod
    def of(cls, config: RouterConfig, info: ShardInfo) -> AdapterNames:
        """As the flags and the shards say, without aliases."""
        return cls(config.adapter_source or "hub", tuple(info.adapter_roots), Aliases())

    def without_aliases(self) -> AdapterNames:
        """The same, for what is an id."""
        return replace(self, aliases=Aliases())

    def key(self, source: str, adapter_id: str) -> AdapterKey:
        """The key of an id as people write it; a hub's may carry its revision.

        Raises ValueError, with a sentence for the client, for an id that its source cannot have.
        """
        if source == recipe.SOURCE:
            return self._merge(adapter_id)
        if source == "hub":
            name, _, revision = adapter_id.partition("@")
            return AdapterKey(source, name, revision)
        return self._in_one_spelling(AdapterKey(source, adapter_id))

    def hidden_by(self, alias: str, key: AdapterKey) -> AdapterKey | None:
        """The other adapter whose id an alias of `key` is, if one could have it."""
        try:
            own = self.key(self.default_source, alias)
        except ValueError:
            return None
        return own if own != key else None

    def _merge(self, text: str) -> AdapterKey:
        merge = recipe.MergeRecipe.parse(text)
        members = (
            replace(member, key=self._in_one_spelling(member.key)) for member in merge.members
        )
        return replace(merge, members=tuple(members)).key

    def _in_one_spelling(self, key: AdapterKey) -> AdapterKey:
        # Without a root the shards refuse every local adapter, and say that this is why.
        if key.source != local_id.SOURCE or not self.roots:
            return key
        return replace(key, id=local_id.local_id(key.id, self.roots))
