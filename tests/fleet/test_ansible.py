"""The role for Ansible, run by Ansible against hosts made of namespaces."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import absent
from tests.fleet.hosts import SSHD, Host
from tests.qemu.guest import MIB, ROOT

EXAMPLE = ROOT / "examples/ansible"
PLAYBOOK = Path(sys.executable).parent / "ansible-playbook"


class Fleet:
    """The hosts, and Ansible with an inventory of them."""

    def __init__(self, directory: Path, hosts: list[Host], key: Path, wheels: Path) -> None:
        self.hosts = hosts
        self._directory = directory
        public = f"{key}.pub"
        known = directory / "known_hosts"
        known.write_text("".join(f"{h.address} {Path(public).read_text()}" for h in hosts))
        self._inventory = directory / "inventory.ini"
        self._inventory.write_text("[hypervisors]\n" + "".join(f"{h.address}\n" for h in hosts))
        (wheel,) = wheels.glob("ramlock-*.whl")
        house = directory / "wheelhouse.tar.gz"
        subprocess.run(["tar", "-C", wheels, "-czf", house, "."], check=True)
        self._variables: dict[str, Any] = {
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(key),
            "ansible_ssh_common_args": f"-F none -o UserKnownHostsFile={known} -o ControlPersist=30s",
            "ansible_python_interpreter": sys._base_executable,  # type: ignore[attr-defined]
            "ramlock_python": sys._base_executable,  # type: ignore[attr-defined]
            "ramlock_package": str(wheel),
            "ramlock_wheelhouse": str(house),
            "ramlock_command": "/usr/local/sbin/ramlock",
            "ramlock_serial": len(hosts),
        }

    def play(self, policy: dict[str, Any], *arguments: str) -> tuple[int, dict[str, dict[str, int]], str]:
        """Runs the playbook: its exit code, what it counted for each host, all that it printed."""
        variables = self._directory / "variables.json"
        variables.write_text(json.dumps({**self._variables, "ramlock_policy": policy}))
        done = subprocess.run(
            [PLAYBOOK, "-i", self._inventory, "-e", f"@{variables}", *arguments, EXAMPLE / "site.yml"],
            capture_output=True,
            text=True,
            timeout=300,
            stdin=subprocess.DEVNULL,
            check=False,
            env={
                **os.environ,
                "ANSIBLE_PIPELINING": "1",
                "ANSIBLE_NOCOLOR": "1",
                "ANSIBLE_HOME": str(self._directory / "ansible"),
                "LC_ALL": "C.UTF-8",
            },
        )
        said = done.stdout + done.stderr
        counts = {
            address: {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", rest)}
            for address, rest in re.findall(r"^([\d.]+) +: (ok=.*)$", done.stdout, re.MULTILINE)
        }
        assert set(counts) == {host.address for host in self.hosts}, said
        return done.returncode, counts, said


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two hosts with two VMs each."""
    if os.geteuid() != 0:
        absent("only root can make network namespaces")
    if not Path(SSHD).exists():
        absent("there is no sshd: apt-get install openssh-server")
    directory = tmp_path_factory.mktemp("fleet")
    key = directory / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", key], check=True)
    wheels = directory / "wheels"
    subprocess.run(
        [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "wheel", "-w", wheels, ROOT],
        check=True,
        timeout=300,
    )
    with ExitStack() as stack:
        hosts = [stack.enter_context(Host(number, directory, key)) for number in range(2)]
        for host in hosts:
            for name in ("web-1", "db"):
                host.start_vm(name, "256M")
        yield Fleet(directory, hosts, key, wheels)


def vms(host: Host) -> dict[str, dict[str, Any]]:
    """By name, what ramlock lists there."""
    listed = json.loads(host.run("/usr/local/sbin/ramlock", "list", "--json"))
    return {vm["name"]: vm for vm in listed}


def locked(host: Host, name: str) -> int:
    """MiB that the kernel holds locked for a VM."""
    pid = host.run("cat", f"/run/{name}.pid").strip()
    status = host.run("cat", f"/proc/{pid}/status")
    return int(re.findall(r"VmLck:\s+(\d+) kB", status)[0]) // 1024


POLICY: dict[str, Any] = {"web-*": {"guarantee": "25%"}, "db": {"guarantee": "96M", "priority": 10}}


def test_hosts_get_ramlock_and_their_guarantees_and_nothing_twice(fleet: Fleet) -> None:
    code, counts, said = fleet.play(POLICY)
    assert code == 0, said
    for host in fleet.hosts:
        assert counts[host.address]["failed"] == 0
        assert {name: vm["locked"] // MIB for name, vm in vms(host).items()} == {"web-1": 64, "db": 96}
        assert (locked(host, "web-1"), locked(host, "db")) == (64, 96)
    code, counts, said = fleet.play(POLICY)
    assert code == 0, said
    assert [count["changed"] for count in counts.values()] == [0, 0], said


def test_a_policy_that_cannot_be_kept_leaves_everything_as_it_was(fleet: Fleet) -> None:
    code, _, said = fleet.play(POLICY, "--tags", "policy")
    assert code == 0, said
    before = fleet.hosts[0].run("cat", "/etc/ramlock/policy.toml")
    code, counts, said = fleet.play({"db": {"guarantee": "1T"}}, "--tags", "policy")
    assert code != 0
    assert all(count["failed"] == 1 for count in counts.values()), said
    for host in fleet.hosts:
        assert host.run("cat", "/etc/ramlock/policy.toml") == before
        assert (locked(host, "web-1"), locked(host, "db")) == (64, 96)


def test_verify_names_the_vm_that_lost_its_guarantee(fleet: Fleet) -> None:
    code, _, said = fleet.play(POLICY, "--tags", "policy")
    assert code == 0, said
    broken, whole = fleet.hosts
    broken.run("/usr/local/sbin/ramlock", "eject", "--vm", "db")
    code, counts, said = fleet.play(POLICY, "--tags", "verify")
    assert code != 0
    assert (counts[broken.address]["failed"], counts[whole.address]["failed"]) == (1, 0)
    assert "db" in said
    assert fleet.play(POLICY, "--tags", "policy,verify")[0] == 0
    assert (locked(broken, "web-1"), locked(broken, "db")) == (64, 96)
