import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --slow"))


def pytest_configure():
    torch.set_num_threads(1)  # quicker for networks this small, and steady on a busy machine


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)
