"""`lorafleet bench` against the real router over a fake shard."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorafleet.deploy.bench.cli import adapter_names, add_flags, run
from tests.bench.router_process import router_over_fake_shard


def bench(*flags: str) -> int:
    parser = ArgumentParser()
    add_flags(parser)
    return run(parser.parse_args(flags))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with router_over_fake_shard() as router:
        yield router.url


@pytest.mark.parametrize("api", ["openai", "lorax"])
@pytest.mark.parametrize("load", ["--concurrency=4", "--rate=200"])
def test_a_run(url: str, tmp_path: Path, api: str, load: str) -> None:
    file = tmp_path / "run.json"
    code = bench(
        f"--url={url}/", f"--api={api}", load, "--adapters=3", "--adapter-prefix=adapter-",
        "--requests=12", "--prompt-tokens=20,40", "--output-tokens=5", f"--output={file}",
    )  # fmt: skip
    written = json.loads(file.read_text())
    results = written["results"]
    assert code == 0, results["failures"]
    assert (results["requests"], results["output_tokens"], results["adapters"]) == (12, 60, 3)
    assert 20 * 12 * 0.7 <= results["prompt_tokens"] <= 40 * 12 * 1.3
    assert results["ttft_ms"]["p50"] > 0
    assert written["config"]["popularity"] == "distinct"


def test_base_and_adapters_together(url: str) -> None:
    assert (
        bench(f"--url={url}", "--adapters=base,adapter-0", "--requests=4", "--output-tokens=3") == 0
    )


def test_failures_are_counted_and_make_the_code(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--adapters=adapter-0,missing", "--requests=4", "--output-tokens=3")
    assert bench(f"--url={url}", *flags) == 1
    assert "2 failed: 404" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [(), ("--api=lorax",), ("--model=m",)])
def test_a_server_that_is_not_there(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    assert bench("--url=http://127.0.0.1:9/", "--requests=1", *flags) == 2
    sentence = "no server at http://127.0.0.1:9: give --url or set LORAFLEET_URL"
    assert capsys.readouterr().err == f"lorafleet bench: error: {sentence}\n"


def test_the_address_may_come_from_the_environment(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORAFLEET_URL", url)
    assert bench("--requests=1", "--output-tokens=1") == 0
    monkeypatch.setenv("LORAFLEET_URL", "localhost:8123")
    assert bench("--requests=1") == 2
    sentence = "LORAFLEET_URL must start with http:// or https://, got 'localhost:8123'"
    assert sentence in capsys.readouterr().err


def test_adapter_names() -> None:
    assert adapter_names("a,b", "") == ("a", "b")
    assert adapter_names("3", "x-") == ("x-0", "x-1", "x-2")
    for adapters, prefix in (("", ""), ("a", "x-"), ("0", "x-")):
        with pytest.raises(ValueError, match="--adapters"):
            adapter_names(adapters, prefix)


@pytest.mark.parametrize(
    "flag", ["--rate=0", "--concurrency=-1", "--popularity=hot", "--prompt-tokens=0"]
)
def test_a_wrong_flag_is_refused(flag: str) -> None:
    with pytest.raises(SystemExit):
        bench("--url=http://localhost", flag)
