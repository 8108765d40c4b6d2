"""One SLURM and one checkout for all tests that submit jobs."""

from __future__ import annotations

import pytest
from checkout import Checkout
from cluster import Cluster, missing_programs


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    if missing := missing_programs():
        pytest.skip(f"SLURM is not installed: no {', '.join(missing)}")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def checkout(tmp_path_factory, root, cluster):
    return Checkout(tmp_path_factory.mktemp("checkout"), root, cluster)
