"""The `lorafleet` command's help is the reference."""

from __future__ import annotations

import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import fields

import pytest

from lorafleet.deploy.cli import main
from lorafleet.deploy.serve import SET_BY_LAUNCHER, add_flags, configs
from lorafleet.router.config import RouterConfig
from lorafleet.shard.config import ShardConfig


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
    assert "127.0.0.1:1" in capsys.readouterr().err


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
