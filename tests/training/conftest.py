from tests.conftest import model_folder  # noqa: F401
