import pytest

from strategies.ckks import CkksParameters, SharedKey


@pytest.fixture(scope="session")
def key() -> SharedKey:
    return SharedKey.generate()


@pytest.fixture(scope="session")
def other_key() -> SharedKey:
    return SharedKey.generate()


@pytest.fixture(scope="session", params=[(4096, (60,)), (8192, (60, 60))], ids=["4096", "8192"])
def parameters(request) -> CkksParameters:
    degree, bits = request.param
    return CkksParameters(degree=degree, bits=bits)


@pytest.fixture(scope="session")
def keys(parameters) -> SharedKey:
    """A key for `parameters`."""
    return SharedKey.generate(parameters)
