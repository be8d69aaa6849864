"""PromptForms: the base model's form and those of the adapters that ship a tokenizer."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from lorafleet.proto.messages import AdapterKey, AdapterTokenizer, ShardInfo
from lorafleet.router.adapter import Adapter
from lorafleet.router.errors import AdapterChanged
from lorafleet.router.prompt_form import BaseForm, PromptForm
from lorafleet.router.template_renderer import TemplateRenderer
from lorafleet.router.tokenizer_reader import TokenizerReader

# In memory a tokenizer takes several times its file.
MAX_BYTES = 128 << 20
MAX_FORMS = 256

Fetch = Callable[[AdapterKey], Awaitable[AdapterTokenizer]]


class PromptForms:
    """Owns the forms, by digest of the files they come from, so that adapters share them.

    Those not used for longest go when there are too many. Adapters' tokenizers and templates run
    in threads and processes of their own: a slow one keeps no request of the base model waiting.
    """

    def __init__(self, info: ShardInfo, num_workers: int, fetch: Fetch) -> None:
        self._base, self._fetch = BaseForm(info, num_workers), fetch
        self._threads = ThreadPoolExecutor(num_workers, "adapter-tokenizer")
        self._reader = TokenizerReader(self._base.tokenizer_json, num_workers)
        self._renderer = TemplateRenderer(num_workers)
        self._forms: OrderedDict[str, PromptForm] = OrderedDict()
        self._builds: dict[str, asyncio.Task[PromptForm]] = {}

    @property
    def base(self) -> PromptForm:
        """The base model's."""
        return self._base.form

    async def of(self, adapter: Adapter | None) -> PromptForm:
        """What an adapter's requests use. Raises AdapterError or ShardLost."""
        digest = adapter.info.tokenizer_digest if adapter is not None else ""
        if adapter is None or not digest:
            return self.base
        if digest in self._forms:
            self._forms.move_to_end(digest)
            return self._forms[digest]
        build = self._builds.get(digest)
        if build is None:
            build = asyncio.create_task(self._build(adapter.key, digest))
            self._builds[digest] = build
            build.add_done_callback(partial(self._built, digest))
        return await asyncio.shield(build)

    async def close(self) -> None:
        """Ends threads and processes."""
        for build in list(self._builds.values()):
            build.cancel()
        await self._renderer.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.base.tokenizer.close()

    async def _build(self, key: AdapterKey, digest: str) -> PromptForm:
        files = await self._fetch(key)
        if files.digest != digest:
            raise AdapterChanged(
                f"the tokenizer of adapter {key} changed after the adapter was loaded; drop the "
                "adapter to load it anew"
            )
        shipped = files.tokenizer_json
        has_bases = not shipped or await self._reader.is_bases(shipped)
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, self._base.adapted, files, has_bases, self._threads,
            self._renderer.render,
        )  # fmt: skip

    def _built(self, digest: str, build: asyncio.Task[PromptForm]) -> None:
        del self._builds[digest]
        if build.cancelled() or build.exception() is not None:
            return
        self._forms[digest] = build.result()
        while len(self._forms) > 1 and self._is_full():
            self._forms.popitem(last=False)

    def _is_full(self) -> bool:
        return (
            len(self._forms) > MAX_FORMS
            or sum(form.nbytes for form in self._forms.values()) > MAX_BYTES
        )
