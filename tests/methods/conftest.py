"""Every test of a method has the same tiny base, and leaves it as it was."""

import pytest

from methods.laboratory import TOP, Lab, generator


@pytest.fixture(scope="session")
def lab() -> Lab:
    return Lab.build()


@pytest.fixture
def model(lab):
    yield lab.model
    lab.model.clear()


@pytest.fixture
def install(lab, model):
    """Put a method's warm adapter on the base as a client of a tier would get it; gives the hooks."""

    def put(method, tier=TOP, state=None):
        profile = lab.profile(method, tier)
        return method.install(model, method.dispatch(state or lab.warm(method), profile), profile, generator(5))

    return put
