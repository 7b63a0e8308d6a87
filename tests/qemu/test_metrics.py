"""What Prometheus is told of a real VM; rules and dashboard ask for what is there, by promtool's word."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import Need
from tests.qemu.conftest import ramlock
from tests.qemu.guest import MIB, ROOT, Guest

EXAMPLES = ROOT / "examples/prometheus"
PROMTOOL = ROOT / ".cache/promtool"
DASHBOARD = json.loads((EXAMPLES / "dashboard.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def promtool(*words: object, text: str | None = None) -> str:
    result = subprocess.run(
        [str(PROMTOOL), *map(str, words)], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.mark.usefixtures("root", "lockable")
def test_a_vm_that_locks() -> None:
    with Guest(memory=256 * MIB, args=["-name", "told"]) as guest:
        guest.settle()
        assert ramlock("set", "64M", "--pid", guest.pid).returncode == 0
        result = ramlock("metrics")
        assert result.returncode == 0, result.stderr
        mine: dict[str, float] = {}
        buckets = []
        for family in text_string_to_metric_families(result.stdout):
            for sample in family.samples:
                if sample.labels.get("pid") == str(guest.pid):
                    assert sample.labels["name"] == "told"
                    if sample.name.endswith("_bucket"):
                        buckets.append(sample.value)
                    mine[sample.name] = sample.value
        assert mine["ramlock_requested_bytes"] == 64 * MIB
        assert mine["ramlock_locked_bytes"] == guest.query()["locked"]
        assert mine["ramlock_guest_ram_bytes"] == 256 * MIB
        assert mine["ramlock_shim"] == mine["ramlock_answers"] == 1
        assert mine["ramlock_lost_bytes_total"] == 0
        assert mine["ramlock_step_seconds_count"] > 0
        assert buckets == sorted(buckets)
        assert buckets[-1] == mine["ramlock_step_seconds_count"]
        assert 0 < mine["ramlock_step_seconds_sum"] < time.monotonic()
        # They go on counting when another guarantee is set, unlike step-max-us.
        assert ramlock("set", "0", "--pid", guest.pid).returncode == 0
        assert guest.query()["step-times"]["count"] > mine["ramlock_step_seconds_count"]


def test_promtool_finds_no_fault(need: Need, tmp_path: Path) -> None:
    need(str(PROMTOOL), "prometheus, by .ci/promtool")
    assert promtool("check", "metrics", text=ramlock("metrics").stdout) == ""
    assert "7 rules found" in promtool("check", "rules", EXAMPLES / "alerts.yml")
    assert "SUCCESS" in promtool("test", "rules", EXAMPLES / "alerts_test.yml")
    rules = [
        {"record": f"panel:{number}", "expr": re.sub(r"\$__rate_interval", "5m", query)}
        for number, query in enumerate(QUERIES)
    ]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(QUERIES)} rules found" in promtool("check", "rules", tmp_path / "rules.yml")


def test_rules_and_dashboard_ask_for_what_is_told() -> None:
    said = set(re.findall(r"^# TYPE (\S+)", ramlock("metrics").stdout, re.MULTILINE))
    asked = set(re.findall(r"\bramlock_\w+", (EXAMPLES / "alerts.yml").read_text() + " ".join(QUERIES)))
    assert {name.removesuffix("_bucket") for name in asked} <= said
    assert all(panel["title"] for panel in DASHBOARD["panels"])
