"""The encoder is timm's, and takes its weights from a file or a cache, never from the net."""

import re
import shutil

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.networks.pvt import CHANNELS, HUB, VARIABLE, PVTEncoder, load_pretrained

from ..nnunet.test_checkpoints import Malicious


@pytest.fixture(scope="module")
def published():
    """A model as timm publishes it, with the head of its classification."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    return timm.create_model("pvt_v2_b2").state_dict()


@pytest.fixture(scope="module")
def encoder():
    return PVTEncoder().eval()


@pytest.fixture(autouse=True)
def nothing_at_hand(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield
    shutil.rmtree(tmp_path)  # files of a hundred megabytes


def has(encoder, published):
    return all(torch.equal(t, published[key]) for key, t in encoder.model.state_dict().items())


def of_the_authors(key):
    """The name that PVT-V2's own files have for what timm calls ``key``."""
    key = key.replace("dwconv", "dwconv.dwconv").replace("patch_embed.", "patch_embed1.")
    key = re.sub(r"stages\.(\d)\.downsample", lambda m: f"patch_embed{int(m[1]) + 1}", key)
    key = re.sub(r"stages\.(\d)\.blocks", lambda m: f"block{int(m[1]) + 1}", key)
    return re.sub(r"stages\.(\d)\.norm", lambda m: f"norm{int(m[1]) + 1}", key)


def test_features_are_those_of_timm(encoder, published):
    headless = {key: w for key, w in published.items() if not key.startswith("head")}
    encoder.model.load_state_dict(headless)
    timms = timm.create_model("pvt_v2_b2", features_only=True).eval()
    timms.load_state_dict({key.replace("stages.", "stages_"): w for key, w in headless.items()})
    x = torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        features = encoder(x)
        for ours, theirs in zip(features, timms(x), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert [f.shape for f in features] == [(1, c, 16 >> j, 8 >> j) for j, c in enumerate(CHANNELS)]


def test_no_weights_are_at_hand(encoder):
    before = {key: w.clone() for key, w in encoder.model.state_dict().items()}
    assert "starts from random weights" in load_pretrained(encoder)
    assert has(encoder, before)


@pytest.mark.parametrize("key", [str, of_the_authors])
def test_weights_of_a_file(encoder, published, tmp_path, monkeypatch, key):
    file = tmp_path / "weights.pth"
    torch.save({key(name): w for name, w in published.items()}, file)
    monkeypatch.setenv(VARIABLE, str(file))
    spoil(encoder)
    assert load_pretrained(encoder) == f"The encoder PVT-V2-B2 starts from pretrained weights: {file}."
    assert has(encoder, published)


def spoil(encoder):
    for w in encoder.model.state_dict().values():
        w.zero_()


def test_weights_of_the_cache(encoder, published, tmp_path):
    folder = tmp_path / "cache" / f"models--{HUB.replace('/', '--')}"
    for sub in ("refs", "snapshots/abc"):
        (folder / sub).mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    safetensors.torch.save_file(published, folder / "snapshots" / "abc" / "model.safetensors")
    spoil(encoder)
    assert f"{folder}/snapshots/abc/model.safetensors." in load_pretrained(encoder)
    assert has(encoder, published)


def test_files_that_have_no_such_weights_get_one_sentence(encoder, published, tmp_path, monkeypatch):
    file = tmp_path / "weights.pth"
    monkeypatch.setenv(VARIABLE, str(file))
    with pytest.raises(LoMixError, match=f"weights.pth is no file: name the weights of PVT-V2-B2 in {VARIABLE}, or"):
        load_pretrained(encoder)
    smaller = {key: w for key, w in published.items() if not key.startswith("stages.3.norm")}
    for content in (smaller, published | {"more": torch.ones(1)}, {3: 4}, Malicious(tmp_path / "made")):
        torch.save(content, file)
        with pytest.raises(LoMixError, match="weights.pth has no weights of PVT-V2-B2; name another .*[.]$") as error:
            load_pretrained(encoder)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "made").exists()
