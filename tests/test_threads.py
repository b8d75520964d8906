import pytest
import torch

from pyro_scm.threads import few_threads


@pytest.fixture
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_small_steps_take_one_thread_and_large_ones_all() -> None:
    with few_threads():
        assert torch.get_num_threads() == 1
    with few_threads(1e12):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_an_error_gives_the_threads_back() -> None:
    with pytest.raises(RuntimeError, match="inside"), few_threads():
        raise RuntimeError("inside")
    assert torch.get_num_threads() == 2
