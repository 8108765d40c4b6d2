"""benchmarks/published_bundle.py: what it tells the published constructor, by a stand-in for the published code."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkout_root import ROOT
from rates_samples import SIZES, rates_model

sys.path.insert(0, str(ROOT))

from benchmarks import published, published_bundle
from lalic.errors import LalicError
from lalic.model import LALIC, published_state_dict


def stand_in() -> SimpleNamespace:
    """A module whose model notes with which widths it builds its blocks, as the published constructor does."""
    module = SimpleNamespace(RwkvBlock_BiV4=lambda dim, hidden_rate=4, with_ckpt=False: ("block", dim, hidden_rate))
    module.EntropyParametersBlock = lambda dim, out, expansion_factor=2, **_: (
        "aggregation",
        dim,
        out,
        expansion_factor,
    )

    class Published:
        def __init__(self, N: int, M: int, dims: Any, depths: Any, groups: Any, use_ckpt: bool = False) -> None:
            self.sizes = (N, M, dims, depths, groups)
            self.g_a, self.context = module.RwkvBlock_BiV4(dims[0]), module.RwkvBlock_BiV4(M, hidden_rate=8)
            self.aggregation = module.EntropyParametersBlock(6, 4, kernel_size=1)

    module.LALIC = Published
    return module


@pytest.mark.parametrize("widths", [{}, {"context_rate": 2, "aggregation_rate": 1}], ids=["published", "narrow"])
def test_sizes_and_hidden_widths(widths: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folded weights of a model of several rates, as its bundles hold them."""
    module = stand_in()
    before = module.RwkvBlock_BiV4, module.EntropyParametersBlock
    monkeypatch.setattr(published, "import_published", lambda _: module)
    torch.manual_seed(0)
    model = LALIC(**SIZES, **widths, rungs=(1, 2)).at(2)
    torch.save(published_state_dict(model), tmp_path / "lalic-mse-q2.pth")
    found = published_bundle.on_cpu(tmp_path, tmp_path / "lalic-mse-q2.pth")()
    config = model.config
    # N is as the widths tell it: that of the file, or larger where it has no effect.
    assert found.sizes[1:] == (32, config["dims"], config["depths"], config["groups"])
    assert found.g_a == ("block", 16, 4)
    assert found.context == ("block", 32, widths.get("context_rate", 8))
    assert found.aggregation == ("aggregation", 6, 4, widths.get("aggregation_rate", 2))
    assert (module.RwkvBlock_BiV4, module.EntropyParametersBlock) == before


def test_what_does_not_fit() -> None:
    """Without the script's help, the published constructor has one rate and two fixed widths."""
    for config in (rates_model().config, LALIC(**SIZES, context_rate=2).config):
        with pytest.raises(LalicError, match=r"^x does not fit the published code, which has context_rate 8"):
            published.published_sizes(config, "x")
    assert published.published_sizes(LALIC(**SIZES).config, "x")["groups"] == [16, 16]
