import pytest
from small_corpora import Prepared, build_corpus


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return build_corpus(tmp_path_factory.mktemp("corpus"))
