"""What the pages say is there: commands and their options, make's targets, files, links, snippets.

Tests with real VMs run them; ELSEWHERE says what is done with those that need more than a VM.
"""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import click
import pytest

from ramlock import policy
from ramlock.commands import VERBS
from tests import pages
from tests.pages import PAGES, ROOT, Command

RUN = {"ramlock", "printf", "socat", "jq", "qemu-system-x86_64", "eval"}
"""First words of what a VM is enough for."""

ELSEWHERE = {
    "make": "its targets are looked for here; tests/test_make.py, tests/packaging and the suite itself run them",
    "build/kernel-facts/NAME": "tests/test_kernel_facts.py runs every one",
    "virsh": "needs libvirtd: tests/qemu/test_libvirt*.py",
    "install": "changes the host; tests/qemu/test_libvirt*.py run what it installs, out of the source",
    "systemctl": "no systemd runs where these tests do",
    "mkdir": "changes /etc; a part of the AppArmor rules, below",
    "cat": "as mkdir",
    "echo": "as mkdir, for SELinux",
    "apparmor_parser": "needs AppArmor to load; tests/qemu/test_security_modules.py has it compile the rules",
    "checkmodule": "tests/qemu/test_security_modules.py compiles the module",
    "semodule_package": "as checkmodule",
    "semodule": "needs SELinux",
    "restorecon": "needs SELinux",
    "semanage": "needs SELinux",
    "systemd-tmpfiles": "needs the SELinux labels of the line above it",
    "ansible-playbook": "several hosts: tests/fleet/test_ansible.py",
    "podman": "needs a container registry; tests/fleet/test_kubevirt.py reads the manifests",
    "kubectl": "needs a cluster; as podman",
    "apt": "changes the host; tests/packaging installs the package into a clean root",
    "pip": "as apt",
    "pipx": "as apt",
}
"""First words of what is not run with a VM, and why; the files that they name have to be there all the same."""

NAMED = [(page, command) for page in PAGES for command in pages.commands(page)]
SIMPLE = [(command, words) for _, command in NAMED for words in pages.simple(command.text)]
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)) | set(
    re.findall(r"^([a-z][a-z-]*):", (ROOT / "shim/rules.mk").read_text(), re.MULTILINE)
)
PROTOCOL = ROOT / "docs/protocol.md"


def parsed(words: list[str]) -> None:
    """Has click read the words of a `ramlock` command as it would, without running it. Raises ClickException."""
    verb, *arguments = words
    assert verb in VERBS, f"ramlock has no verb {verb}"
    command = importlib.import_module(f"ramlock.commands.{verb}").command
    assert isinstance(command, click.Command)
    command.make_context(verb, arguments)


def options(verb: str) -> set[str]:
    command = importlib.import_module(f"ramlock.commands.{verb}").command
    return {name for param in command.params for name in (*param.opts, *param.secondary_opts)} | {"--help"}


def test_there_are_commands() -> None:
    """What takes them out of the pages finds them."""
    assert len(SIMPLE) > 60
    assert {words[1] for _, words in SIMPLE if words[0] == "ramlock"} == set(VERBS), "a verb that no page shows"


def test_every_command_is_run_or_it_is_said_why_not() -> None:
    unknown = [command.where for command, words in SIMPLE if words[0] not in RUN | set(ELSEWHERE)]
    assert not unknown, "say so in ELSEWHERE, or mark the block as ```text"


@pytest.mark.parametrize("name", ["README.md", "docs", "examples"])
def test_ramlock_commands(name: str) -> None:
    for command, words in SIMPLE:
        if words[0] == "ramlock" and command.page.relative_to(ROOT).parts[0] == name:
            try:
                parsed(words[1:])
            except Exception as error:
                error.add_note(command.where)
                raise


def test_commands_in_the_text() -> None:
    """Those between backticks: verbs and options are there, and so are make's targets."""
    for page in PAGES:
        for span in pages.spans(page):
            if match := re.match(r"ramlock ([a-z]+)\b", span):
                assert match[1] in VERBS, (page, span)
                wanted = set(re.findall(r"(?<=[ [])--[a-z-]+", span))
                assert wanted <= options(match[1]), (page, span)
            elif span.startswith("make "):
                for word in shlex.split(span)[1:]:
                    assert "=" in word or word in TARGETS, (page, span)


def test_make_targets() -> None:
    for command, words in SIMPLE:
        if words[0] == "make":
            for word in words[1:]:
                assert "=" in word or word in TARGETS, command.where


def files(words: str) -> Iterator[str]:
    """What looks like the path of a file of ours."""
    for word in re.findall(r"[^\s'\"(),;:=]+", words):
        if re.match(r"(docs|examples|tests|benchmarks|shim|injector|packaging|debian|\.ci)/", word):
            yield word


def test_files_are_there() -> None:
    for page in PAGES:
        for text in [*pages.spans(page), *(command.text for command in pages.commands(page))]:
            for name in files(text):
                if not name.endswith(("ramlock.so", "/NAME")):  # what is built
                    assert list(ROOT.glob(name.rstrip("/"))), (page, text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    for link in pages.links(page):
        if not link.startswith(("https://", "http://")):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), link
            assert not anchor or anchor in pages.anchors(target), link


def test_readme_leads_to_every_page() -> None:
    readme = ROOT / "README.md"
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in pages.links(readme)}
    linked |= {path.parent for path in linked if path.name == "README.md"}
    folders = {path for path in (ROOT / "examples").iterdir() if path.is_dir() and not path.name.startswith(("_", "."))}
    assert {*(ROOT / "docs").glob("*.md"), ROOT / "docs/kernel-facts", *folders} <= linked


def test_every_block_says_what_it_is() -> None:
    for page in PAGES:
        fences = len(re.findall(r"^ *(?:```|~~~)", page.read_text(), re.MULTILINE))
        found = [*pages.blocks(page)]
        assert fences == 2 * len(found), f"{page} has a fence that is not understood"
        for block in found:
            assert block.language in ("", "sh", "text", "toml", "xml", "python"), block.where


def test_snippets(tmp_path: Path) -> None:
    """TOML is a policy and XML is well formed. Python is run by tests/qemu/test_library.py."""
    for page in PAGES:
        for block in pages.blocks(page):
            if block.language == "toml":
                tomllib.loads(block.text)
                file = tmp_path / "policy.toml"
                file.write_text(block.text)
                assert policy.load(file).rules, block.where
            elif block.language == "xml":
                ElementTree.fromstring(block.text)
            elif block.language == "python":
                assert page.name == "library.md", block.where


def test_requests() -> None:
    """What is sent as QMP is what the protocol's page has."""
    table = pages.table(PROTOCOL.read_text(), "## Commands")
    shown = [(page, request) for page in PAGES for request in pages.executes(page.read_text())]
    assert len(shown) >= 5
    for page, request in shown:
        assert request["execute"] in table, (page, request)
        for argument in request.get("arguments", {}):
            assert f"`{argument}" in table[request["execute"]][0], (page, request)


def test_it_would_be_noticed() -> None:
    """What is held here can fail."""
    for words in (["sett", "1G"], ["set", "1G", "--nvm", "web"], ["set", "1GB", "--vm", "web"], ["set", "--vm", "web"]):
        with pytest.raises(Exception, match=r"sett|nvm|GB|size"):
            parsed(words)
    text = "A=1 ramlock set 1G --vm 'a b' 2>x | tee log && make demo # not this"
    assert [*pages.simple(text)] == [["ramlock", "set", "1G", "--vm", "a b", "2"], ["tee", "log"], ["make", "demo"]]
    assert pages.anchors(ROOT / "docs/protocol.md") >= {"events", "query-ram-minguarantee", "as-qemus-monitor-and-not"}
    assert isinstance(NAMED[0][1], Command)
