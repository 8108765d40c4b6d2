"""Fixtures that every part shares: where the golden values and the photographs are, and small models."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout_root import ROOT

# Before torch is imported, here and in every program that a test starts: OpenMP's threads spin while they wait for each
# other, which is ten times slower as soon as another process wants the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _shared(name: str) -> Path:
    """A folder of material that is not part of the repository: LALIC_SHARED, or `shared` beside the checkout."""
    folder = Path(os.environ.get("LALIC_SHARED", ROOT.parent / "shared")) / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent (set LALIC_SHARED to the folder that holds {name}/)")
    return folder


@pytest.fixture(autouse=True)
def own_switches() -> Iterator[None]:
    """What programs set for their whole process is as it was after each test: many run in the process of the tests."""
    import torch

    environment = dict(os.environ)
    threads, onednn = torch.get_num_threads(), torch.backends.mkldnn.enabled
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    for name in os.environ.keys() - environment.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update(environment)
    torch.set_num_threads(threads)
    torch.backends.mkldnn.enabled = onednn
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Golden values: state_dict.json, lalic_golden.npz, biwkv_golden.npz, published_rd.json ..."""
    return _shared("reference")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real photographs: kodak/ and bsds500/{train,val}."""
    return _shared("data")


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT
