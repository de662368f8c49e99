import pytest
import torch

from fairtuning.runs import Store


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The threads of several test processes would only get in each other's way."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Files with slow tests come first: of several processes none is left with the longest of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Empty folders for data and results, and no mirror: nothing of the checkout is read or written."""
    monkeypatch.setenv("FAIRTUNING_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("FAIRTUNING_RESULTS", str(tmp_path / "results"))
    monkeypatch.delenv("FAIRTUNING_MIRROR", raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def classroom(tmp_path_factory) -> Store:
    """The classroom records of Figs 3 to 5 and of some controls, made once and undisturbed; only ever read."""
    from fairtuning import runs
    from fairtuning.studies import zhang2024

    labels = [label for name in ("figure3", "figure4", "figure5") for label in zhang2024.LABELS[name]]
    labels += ["f+SVD/sgd", "OURS/sgd", "random/sgd", "random", "TL/converged", "f+SVD/converged", "OURS/converged"]
    folder = tmp_path_factory.mktemp("classroom")
    return runs.ensure(zhang2024, labels, profile="classroom", folder=folder, progress=False)
