import os

import huggingface_hub
import pytest
import transformers

from tests.hub_cards.hub_server import HubServer


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of our own, which this process and those that it starts push to and load from."""
    with HubServer() as server:
        for name in ("HF_TOKEN", "HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)  # made when it was imported
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # made when it is first needed
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            huggingface_hub.constants, "HF_HUB_DISABLE_XET", True
        )  # storage of the real Hub's own kind
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        server.environment = {
            **os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip
        yield server
