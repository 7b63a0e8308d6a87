"""When the daemon reads its policy again. Its life among VMs is in tests/qemu/test_daemon.py."""
# SPDX-License-Identifier: GPL-2.0-or-later

from pathlib import Path

from ramlock.daemon import Daemon, _Later
from ramlock.notify import Notifier

WHOLE = '[vm."*"]\nguarantee = "0"\n[vm.db]\nguarantee = "8G"\n'


def rules(daemon: Daemon) -> int:
    return len(daemon._policy.rules)


def test_half_a_policy_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    """An editor that writes piece by piece; without its last table this one takes all from the VM db."""
    path = tmp_path / "policy.toml"
    path.write_text(WHOLE)
    daemon = Daemon(path, Notifier({}), lambda text: None)
    with path.open("w") as file:
        for piece in WHOLE.partition("[vm.db]"):
            file.write(piece)
            file.flush()
            assert not daemon._reread()
            assert rules(daemon) == 2
    path.write_text("")
    assert not daemon._reread()
    assert daemon._reread()
    assert rules(daemon) == 0
    assert not daemon._reread()
    path.write_text(WHOLE)
    daemon.reload.set()  # whoever asks for it at once has written it
    assert daemon._reread()
    assert rules(daemon) == 2
    assert not daemon._reread()


def test_two_who_want_different_things_do_not_go_on_for_ever() -> None:
    """A guarantee is put back at once at first; what changes by itself, as with guest RAM, is nobody's doing."""
    later, key = _Later(), (1, 2)
    for size in range(20):
        assert not later.placed(key, had=size, want=size + 1)
        assert not later.holds(key)
    told = []
    for _ in range(6):
        assert later.holds(key) == (True in told)
        told.append(later.placed(key, had=100, want=20))
    assert told == [False, False, False, True, False, False]
    assert not later.placed((3, 4), had=100, want=20)
    later.clear()
    assert not later.holds(key)
