"""Tiny sources stay tiny: Qwen-Image-Edit-Plus resizes all of them to constants of its module."""

import pytest

from tests.families import fixtures


@pytest.fixture(autouse=True)
def small_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

    monkeypatch.setattr(module, "CONDITION_IMAGE_SIZE", fixtures.AREA)
    monkeypatch.setattr(module, "VAE_IMAGE_SIZE", fixtures.AREA)
