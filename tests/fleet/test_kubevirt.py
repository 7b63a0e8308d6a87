"""The manifests for KubeVirt: what Kubernetes' schemas say of them, and whether they say what our command takes."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import tomllib
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.qemu.conftest import ramlock
from tests.qemu.guest import ROOT

MANIFESTS: list[dict[str, Any]] = list(yaml.safe_load_all((ROOT / "examples/kubevirt/ramlock.yaml").read_text()))
NEWEST = kubernetes_validate.latest_version()


def of(kind: str) -> dict[str, Any]:
    return next(manifest for manifest in MANIFESTS if manifest["kind"] == kind)


@pytest.mark.parametrize("version", ["1.30", NEWEST])
@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: str(manifest["kind"]))
def test_manifests_fit_the_schemas_of_kubernetes(manifest: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


def test_a_wrong_manifest_does_not_fit() -> None:
    wrong = of("DaemonSet")
    wrong = {**wrong, "spec": {**wrong["spec"], "hostPid": True}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, NEWEST, strict=True)


def test_everything_is_in_one_namespace() -> None:
    name = of("Namespace")["metadata"]["name"]
    assert {m["metadata"]["namespace"] for m in MANIFESTS if m["kind"] != "Namespace"} == {name}


def test_volumes_and_labels_belong_together() -> None:
    spec = of("DaemonSet")["spec"]
    pod = spec["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for c in pod["containers"] for mount in c["volumeMounts"]} == set(volumes)
    assert volumes["policy"]["configMap"]["name"] == of("ConfigMap")["metadata"]["name"]
    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]


def test_the_command_takes_these_arguments_and_this_policy(tmp_path: Any) -> None:
    (container,) = of("DaemonSet")["spec"]["template"]["spec"]["containers"]
    program, verb, option, path = container["command"]
    assert (program, path) == ("ramlock", "/etc/ramlock/policy.toml")
    assert option in ramlock(verb, "--help").stdout
    policy = tmp_path / "policy.toml"
    policy.write_text(of("ConfigMap")["data"]["policy.toml"])
    assert tomllib.loads(policy.read_text())["uids"] == [107], "KubeVirt's QEMUs"
    result = ramlock("apply", "--dry-run", policy)
    assert result.returncode == 0, result.stderr
