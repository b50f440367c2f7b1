"""The device that `auto` resolves to: detected once, then cached for this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mechdsl.pipeline import identities
from mechdsl.pipeline.identities import cached_device, detect_device
from mechdsl.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "kept")


def test_detected_device_is_cached(store: Store) -> None:
    assert cached_device(store, "auto") is None
    found = detect_device(store, "auto")
    assert found.partition(" ")[0] in ("cpu", "cuda", "mps")
    assert cached_device(store, "auto") == found
    assert cached_device(store, "cpu") == "cpu"
    assert cached_device(store, "cuda:1") is None


@pytest.mark.parametrize("changed", ["host", "files", "visible", "driver", "torch"])
def test_cached_device_depends_on_host_driver_and_environment(
    changed: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    detect_device(store, "auto")
    match changed:
        case "host":
            monkeypatch.setattr("platform.node", lambda: "other")
        case "files":
            monkeypatch.setattr(identities, "_device_files", lambda: ["nvidia0"])
        case "visible":
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
        case "driver":
            monkeypatch.setattr(identities, "_driver", lambda: "other")
        case _:
            monkeypatch.setattr(identities, "package_version", lambda name: "9")
    assert cached_device(store, "auto") is None


def test_gpu_device_is_cached_with_its_name(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mechdsl.loading.devices.get_device", lambda name: torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert detect_device(store, "cuda:1") == "cuda GPU 1"
    assert cached_device(store, "cuda:1") == "cuda GPU 1"
