import pytest

from tests.tiny_pipeline import save_tiny_pipeline


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """The random tiny pipeline as a Diffusers folder, with prompts."""
    return save_tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny")
