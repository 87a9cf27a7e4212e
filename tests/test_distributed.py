"""Sums over two processes, and none where there is one."""

import socket

import pytest
import torch
from torch import multiprocessing as mp

from ppo_fast import distributed as own
from ppo_fast.functional.whiten import moments


def in_two_processes(rank, port, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    found = {"size": own.world_size(), "rank": own.rank()}
    sums, largest = [torch.tensor([1.0 + rank]), torch.tensor([10.0])], torch.tensor([float(rank)])
    own.all_sum_(sums)
    own.all_max_(largest)
    given = torch.tensor([5.0 + rank])
    own.broadcast_([given])
    found |= {"sums": [float(s) for s in sums], "largest": float(largest), "given": float(given)}
    data = torch.arange(7.0).square() + 1e4
    found["moments"] = own.all_moments(moments(data[:2] if rank == 0 else data[2:])).tolist()
    try:
        with own.failing_together(torch.device("cpu")):
            if rank == 1:
                raise ValueError("its own")
    except Exception as error:
        found["error"] = repr(error)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    mp.spawn(in_two_processes, args=(port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_sums_and_maxima_are_over_both(found):
    for rank, result in enumerate(found):
        assert (result["size"], result["rank"]) == (2, rank)
        assert result["sums"] == [3.0, 20.0]
        assert result["largest"] == 1.0


def test_what_is_broadcast_is_process_zeros(found):
    assert [result["given"] for result in found] == [5.0, 5.0]


def test_moments_are_those_of_all_values(found):
    data = (torch.arange(7.0).square() + 1e4).double()
    expected = [7.0, float(data.mean()), float((data - data.mean()).square().sum())]
    for result in found:
        assert result["moments"] == pytest.approx(expected, rel=1e-6)


def test_an_error_in_one_process_ends_both(found):
    assert found[1]["error"] == "ValueError('its own')"
    assert "another process failed" in found[0]["error"]


def test_one_process_is_left_alone():
    tensor = torch.ones(3)
    own.all_sum_([tensor])
    own.all_max_(tensor)
    own.broadcast_([tensor])
    assert (own.world_size(), own.rank()) == (1, 0)
    assert tensor.tolist() == [1.0, 1.0, 1.0]
    of_three = torch.tensor([3.0, 1.0, 2.0])
    assert own.all_moments(of_three) is of_three
    with pytest.raises(KeyError), own.failing_together(torch.device("cpu")):
        raise KeyError("mine")
