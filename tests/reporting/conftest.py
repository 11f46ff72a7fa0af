from tests.training.conftest import model_folder  # noqa: F401
