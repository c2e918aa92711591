"""The downloads and nnU-Net's folders, for all converters."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import NnUNet

from .downloads import write_acdc, write_clinicdb, write_synapse

MAKERS = {"synapse": write_synapse, "acdc": write_acdc, "polyp": write_clinicdb}


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> dict[str, Path]:
    """The three downloads, not to be changed; each is written when it is first asked for."""

    class Downloads(dict):
        def __missing__(self, kind: str) -> Path:
            return self.setdefault(kind, MAKERS[kind](tmp_path_factory.mktemp("downloads") / kind))

    return Downloads()


@pytest.fixture
def nnunet(tmp_path, monkeypatch) -> NnUNet:
    """nnU-Net's folders, which aren't there yet."""
    nnunet = NnUNet(tmp_path / "nnunet")
    for part in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{part}", str(getattr(nnunet, part)))
    return nnunet


@pytest.fixture
def own(tmp_path, whole):
    """Gives a copy of a download, to spoil; its files are links, so replace them rather than write into them."""

    def copy(kind: str) -> Path:
        return shutil.copytree(whole[kind], tmp_path / "own" / kind, copy_function=lambda a, b: Path(b).hardlink_to(a))

    return copy
