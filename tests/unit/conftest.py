"""The tiny model of `model_fixtures`, written once per session; imports torch only where a test asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from model_fixtures import Maker

    from verl.models.policy import Policy
    from verl.utils.dataset.patches import StoredPatches


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import model_fixtures

    return model_fixtures.write_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def tokenizer_of_tiny(tiny_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="session")
def shared_policy(tiny_folder: Path) -> Policy:
    """Read-only: tests that change weights or collect gradients take `policy`."""
    import model_fixtures

    return model_fixtures.open_policy(tiny_folder).requires_grad_(False)


@pytest.fixture
def policy(tiny_folder: Path) -> Policy:
    import model_fixtures

    return model_fixtures.open_policy(tiny_folder)


@pytest.fixture(scope="session")
def patches() -> StoredPatches:
    import model_fixtures

    return model_fixtures.patch_source()


@pytest.fixture
def make(shared_policy: Policy) -> Maker:
    import model_fixtures

    return model_fixtures.Maker(shared_policy.config)
