"""The `lorafleet` command's help is the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import fields

import pytest

from lorafleet.deploy.cli import main
from lorafleet.deploy.serve import SET_BY_LAUNCHER, add_flags, configs
from lorafleet.router.config import RouterConfig
from lorafleet.shard.config import ShardConfig
from tests.bench.router_process import router_over_fake_shard


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "lorafleet.deploy", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("argv", [("--help",), ("serve", "--help")])
def test_help_names_every_flag(argv: tuple[str, ...]) -> None:
    shown = run(*argv)
    assert shown.returncode == 0
    for field in (*fields(ShardConfig), *fields(RouterConfig)):
        flag = f"--{field.name.replace('_', '-')} "
        if field.name == "prefix_caching":
            flag = "--prefix-caching,"
        assert (flag in shown.stdout) == (field.name not in SET_BY_LAUNCHER), flag


def test_the_overview_names_the_commands() -> None:
    shown = run("--help").stdout
    assert "serve" in shown
    assert "lorafleet bench" in shown
    assert "lorafleet adapters check" in shown
    assert "--admin-api-key" in shown


def test_the_admin_key_is_not_shown_by_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADMIN_API_KEY", "letmein")
    assert "letmein" not in run("--help").stdout


def test_adapters_without_a_server_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "list", "--url", "http://127.0.0.1:1"]) == 2
    sentence = "no server at http://127.0.0.1:1: give --url or set LORAFLEET_URL"
    assert capsys.readouterr().err == f"lorafleet adapters: error: {sentence}\n"


@pytest.mark.parametrize(
    ("argv", "variable", "complaint"),
    [
        (("--url=localhost:8123",), "", "--url must start with http:// or https://"),
        ((), "localhost:8123", "LORAFLEET_URL must start with http:// or https://"),
    ],
)
def test_an_address_without_a_scheme_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: tuple[str, ...],
    variable: str,
    complaint: str,
) -> None:
    monkeypatch.setenv("LORAFLEET_URL", variable)
    for command in (["adapters", "list"], ["adapters", "load", "json"]):
        assert main([*command, *argv]) == 2
        assert f"{complaint}, got 'localhost:8123'" in capsys.readouterr().err


def test_a_model_that_is_no_directory_is_told_before_torch_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lorafleet.deploy.adapters.check", None)
    assert main(["adapters", "check", "./my-adapter", "--model-id", "./my-model"]) == 2
    sentence = "--model-id ./my-model is not a directory"
    assert capsys.readouterr().err == f"lorafleet adapters: error: {sentence}\n"


def test_adapters_have_four_sources(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["adapters", "load", "json", "--source=carrier-pigeon"])
    assert "'local', 'hub', 's3', 'http'" in capsys.readouterr().err


def without_a_reader(*argv: str) -> tuple[int, bytes]:
    """The exit code and the complaints of a command whose output nobody reads."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-P", "-m", "lorafleet.deploy", *argv]
    environment = os.environ | {"PYTHONUNBUFFERED": ""}  # with it, argparse hides the error
    try:
        done = subprocess.run(
            command, stdout=write, stderr=subprocess.PIPE, env=environment, check=False
        )
    finally:
        os.close(write)
    return done.returncode, done.stderr


@pytest.mark.parametrize("argv", [("--help",), ("--version",), ("adapters", "load", "--help")])
def test_a_reader_that_leaves_is_no_error(argv: tuple[str, ...]) -> None:
    assert without_a_reader(*argv) == (141, b"")


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_nor_is_it_for_what_a_server_answers(flags: tuple[str, ...]) -> None:
    with router_over_fake_shard() as router:
        code, said = without_a_reader(
            "adapters", "load", "adapter-0", f"--url={router.url}", *flags
        )
    assert (code, said) == (141, b"")


def test_the_machines_own_name_is_not_where_to_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTNAME", "container-1")
    monkeypatch.delenv("LORAFLEET_HOSTNAME", raising=False)
    parser = ArgumentParser()
    add_flags(parser)
    assert configs(parser.parse_args(["--model-id=m"]))[1].hostname == "0.0.0.0"
    monkeypatch.setenv("LORAFLEET_HOSTNAME", "127.0.0.1")
    parser = ArgumentParser()
    add_flags(parser)
    assert configs(parser.parse_args(["--model-id=m"]))[1].hostname == "127.0.0.1"


def test_version() -> None:
    assert run("--version").stdout == "lorafleet 0.1.0\n"


@pytest.mark.parametrize("argv", [(), ("swim",), ("serve",), ("serve", "--model-id", "m", "--x")])
def test_what_it_cannot_do_exits_with_2(argv: tuple[str, ...]) -> None:
    shown = run(*argv)
    assert shown.returncode == 2
    assert "usage: lorafleet" in shown.stderr


def test_a_refused_value_is_told_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model-id", "m", "--num-shard", "0"]) == 2
    assert "--num-shard must be between 1 and 64, got 0" in capsys.readouterr().err
