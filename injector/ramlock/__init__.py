"""ramlock: a guaranteed amount of locked guest RAM for an unmodified QEMU, changed while the VM runs.

    import ramlock
    vm = ramlock.VM.find("web")
    vm.set("2G")
    print(vm.guarantee.locked)

docs/library.md explains it. What is named here is loaded when it is used, so that importing ramlock costs nothing.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ramlock import errors as errors
    from ramlock.api import VM as VM
    from ramlock.control import Event as Event
    from ramlock.errors import RamlockError as RamlockError
    from ramlock.reply import Guarantee as Guarantee
    from ramlock.reply import State as State
    from ramlock.survey import Seen as Seen

_HOME = {
    "VM": "api",
    "Event": "control",
    "RamlockError": "errors",
    "Guarantee": "reply",
    "State": "reply",
    "Seen": "survey",
    "errors": "",
}
__all__ = ["VM", "Event", "Guarantee", "RamlockError", "Seen", "State", "errors"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'ramlock' has no attribute '{name}'")
    import importlib

    home = importlib.import_module(f"ramlock.{_HOME[name] or name}")
    return getattr(home, name) if _HOME[name] else home


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
