"""The head with its vocabulary over two processes against the whole of it in one, in float64.

All that needs two processes runs in one pair of them, which leaves its results for the tests.
"""

from __future__ import annotations

import math
import re
import socket

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from ppo_fast.functional import _rows
from ppo_fast.functional import parallel_head as module
from ppo_fast.functional.linear_head import log_probs_from_hidden, ppo_loss_from_hidden
from ppo_fast.functional.log_probs import log_probs_from_logits
from ppo_fast.functional.parallel_head import (
    VocabShard,
    full_head,
    local_head,
    parallel_log_probs_from_hidden,
    parallel_log_probs_from_logits,
    parallel_ppo_loss_from_hidden,
    vocab_shard,
)

F64 = torch.float64
SIZE, CUT, WIDTH, ROWS = 37, 20, 5, 11
PARTS = slice(0, CUT), slice(CUT, SIZE)
SMALL = {"workspace_mb": 4 * SIZE * 8 / (1 << 20)}  # some rows a chunk
ALL = {"temperature": 0.7, "softcap": 3.0, "logit_scale": 0.5}


def drawn(rows=ROWS, dtype=F64, seed=0):
    """Inputs of the whole vocabulary, the same in every process."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=F64).to(dtype)

    return {
        "hidden": randn(rows, WIDTH),
        "weight": randn(SIZE, WIDTH),
        "bias": randn(SIZE),
        "logits": 4 * randn(rows, SIZE),
        "index": torch.randint(SIZE, (rows,), generator=g),
        "mask": torch.rand(rows, generator=g) > 0.4,
        "g": randn(rows),
        "h": randn(rows),
        "old_log_probs": randn(rows) / 4 - 3,
        "advantages": randn(rows),
        "ref_log_probs": randn(rows) / 4 - 3,
        "values": randn(rows),
        "returns": randn(rows),
    }


def one_shard(x):
    """No index on the second process."""
    x["index"] = x["index"] % CUT


def dead_shard(x):
    """The second process's logits all -inf; indices there and elsewhere."""
    x["bias"][CUT:] = -math.inf
    x["logits"][:, CUT:] = -math.inf


def dead_rows(x):
    x["logits"][2] = -math.inf
    x["logits"][3, :CUT] = -math.inf
    x["logits"][4, CUT:] = -math.inf
    x["logits"][5, x["index"][5]] = -math.inf


def far_apart(x):
    """Maxima of the two parts that no exponential spans."""
    x["logits"][::2, :CUT] += 1e5
    x["logits"][1::2, CUT:] += 1e5
    x["hidden"] *= 100


def wild_rows(x):
    x["logits"][1, 0] = math.nan
    x["logits"][2, SIZE - 1] = math.inf


def wild_masked(x):
    x["mask"][:3] = torch.tensor([False, False, True])
    x["logits"][0] = math.nan
    x["hidden"][1] = math.inf
    x["index"][0] = 10**6


def shaped(x):
    for name in ("hidden", "logits"):
        x[name] = x[name].view(2, 3, -1)
    for name in ("index", "mask", "g", "h"):
        x[name] = x[name].view(2, 3)


CASES = {
    # rows, edit of the inputs, whether masked, options
    "plain": (ROWS, None, False, {}),
    "every option": (ROWS, None, True, ALL),
    "temperature in a tensor": (ROWS, None, False, {"temperature": torch.tensor(1.3, dtype=F64)}),
    "a target in one part only": (ROWS, one_shard, False, {}),
    "a part all -inf": (ROWS, dead_shard, False, {}),
    "rows all -inf": (ROWS, dead_rows, False, {}),
    "parts far apart": (ROWS, far_apart, False, {}),
    "NaN and inf": (ROWS, wild_rows, False, {}),
    "anything where masked": (ROWS, wild_masked, True, {}),
    "no rows": (0, None, False, {}),
    "one row": (1, None, False, {}),
    "all masked": (ROWS, lambda x: x["mask"].zero_(), True, ALL),
    "further dimensions": (6, shaped, True, {}),
    "small workspace": (ROWS, None, True, SMALL | ALL),
}
LOGITS_OPTIONS = ("temperature",)

LOSSES = {
    # rows, tensors given, options
    "plain": (ROWS, (), {}),
    "every term": (
        ROWS,
        ("mask", "ref_log_probs", "values", "returns"),
        {"ent_coef": 0.3, "kl_coef": 0.2, "old_kl_coef": 0.1, "norm_adv": True, "dual_clip": 1.5},
    ),
    "every option": (ROWS, ("mask",), ALL | {"ent_coef": 0.3, "normalizer": 50.0}),
    "small workspace": (ROWS, ("mask",), ALL | SMALL | {"ent_coef": 0.3}),
    "a part all -inf": (ROWS, ("ref_log_probs",), {"ent_coef": 0.3, "kl_coef": 0.2}),
    "no rows": (0, ("values", "returns"), {"ent_coef": 0.3}),
    "one row": (1, (), {"ent_coef": 0.3}),
}


def log_prob_case(name, kind):
    """Inputs and options of a case for the op from "logits" or "hidden"."""
    rows, edit, masked, options = CASES[name]
    x = drawn(rows)
    if edit is not None:
        edit(x)
    if kind == "logits":
        options = {key: value for key, value in options.items() if key in LOGITS_OPTIONS}
    return x, options | ({"mask": x["mask"]} if masked else {}) | {"with_entropy": True}


def differentiated(outputs, upstream, leaves):
    """Outputs and gradients, by name."""
    torch.autograd.backward(outputs, upstream)
    found = dict(zip(("log_probs", "entropy"), (x.detach() for x in outputs), strict=True))
    return found | {f"grad {name}": x.grad for name, x in leaves.items()}


def leaf(x):
    return x.detach().clone().requires_grad_()


def from_logits(name, part=None, group=None):
    x, options = log_prob_case(name, "logits")
    if part is None:
        logits = leaf(x["logits"])
        outputs = log_probs_from_logits(logits, x["index"], **options)
    else:
        logits = leaf(x["logits"][..., part])
        outputs = parallel_log_probs_from_logits(logits, x["index"], group, **options)
    return differentiated(outputs, (x["g"], x["h"]), {"logits": logits})


def from_hidden(name, part=None, group=None, dtype=F64):
    x, options = log_prob_case(name, "hidden")
    own = slice(None) if part is None else part
    leaves = {
        "hidden": leaf(x["hidden"].to(dtype)),
        "weight": leaf(x["weight"][own].to(dtype)),
        "bias": leaf(x["bias"][own].to(dtype)),
    }
    given = leaves["hidden"], leaves["weight"], x["index"]
    options |= {"bias": leaves["bias"]}
    if part is None:
        outputs = log_probs_from_hidden(*given, **options)
    else:
        outputs = parallel_log_probs_from_hidden(*given, group, **options)
    return differentiated(outputs, [x[key].to(outputs[0].dtype) for key in "gh"], leaves)


def loss(name, part=None, group=None, sink=False):
    rows, names, options = LOSSES[name]
    x = drawn(rows)
    if name == "a part all -inf":
        dead_shard(x)
        assert bool((x["index"] >= CUT).any())
    own = slice(None) if part is None else part
    leaves = {
        "hidden": leaf(x["hidden"]),
        "weight": leaf(x["weight"][own]),
        "bias": leaf(x["bias"][own]),
    }
    options = options | {key: x[key] for key in names} | {"clip_coef": 0.2}
    if "values" in names:
        leaves["values"] = options["values"] = leaf(x["values"])
    given = leaves["hidden"], leaves["weight"], x["index"], x["old_log_probs"], x["advantages"]
    options |= {"bias": leaves["bias"]}
    buffer = torch.ones_like(leaves["weight"]) if sink else None
    if part is None:
        result = ppo_loss_from_hidden(*given, **options)
    else:
        result = parallel_ppo_loss_from_hidden(*given, group, weight_grad=buffer, **options)
    (result.loss * (1.0 if sink else 3.0)).backward()
    found = {"loss": result.loss.detach(), "stats": result.stats}
    found |= {f"grad {key}": tensor.grad for key, tensor in leaves.items()}
    return found | ({"buffer": buffer} if sink else {})


class Counted:
    """Which collectives a block asks for, each with the elements a process sends."""

    def __enter__(self):
        self.calls, self.saved = [], (dist.all_gather, dist.all_reduce)

        def all_gather(into, tensor, group=None):
            self.calls.append(("all_gather", list(tensor.shape)))
            return self.saved[0](into, tensor, group=group)

        def all_reduce(tensor, group=None):
            self.calls.append(("all_reduce", list(tensor.shape)))
            return self.saved[1](tensor, group=group)

        dist.all_gather, dist.all_reduce = all_gather, all_reduce
        return self

    def __exit__(self, *error):
        dist.all_gather, dist.all_reduce = self.saved


def collectives(part, group):
    """Of the ops, forward and backward."""
    x, found = drawn(), {}
    given = x["index"], group
    shard = vocab_shard(part.stop - part.start, group, torch.device("cpu"))
    found["shard"] = tuple(shard)
    with Counted() as forward:
        logits = leaf(x["logits"][:, part])
        out = parallel_log_probs_from_logits(logits, *given, shard=shard)
    with Counted() as backward:
        out.sum().backward()
    found["logits"] = forward.calls, backward.calls
    hidden, weight = leaf(x["hidden"]), leaf(x["weight"][part])
    with Counted() as forward:
        out = parallel_log_probs_from_hidden(hidden, weight, *given, shard=shard, **SMALL)
    with Counted() as backward:
        out.sum().backward()
    found["hidden"] = forward.calls, backward.calls
    rows = x["old_log_probs"], x["advantages"]
    for name, leaf_hidden in (("loss", hidden), ("loss, hidden constant", hidden.detach())):
        options = {"clip_coef": 0.2, "ent_coef": 0.1, "shard": shard} | SMALL
        with Counted() as forward:
            result = parallel_ppo_loss_from_hidden(
                leaf_hidden, weight, x["index"], *rows, group, **options
            )
        with Counted() as backward:
            result.loss.backward()
        found[name] = forward.calls, backward.calls
    try:
        parallel_log_probs_from_logits(x["logits"][:, part], x["index"] + SIZE, group)
    except IndexError as error:
        found["error"] = str(error)
    return found


def tensors_over_meshes(rank, group):
    """`local_head` of DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, x, found = init_device_mesh("cpu", (2,)), drawn(), {}
    for placement in (Shard(0), Replicate()):
        weight = distribute_tensor(x["weight"], mesh, [placement]).requires_grad_()
        local, shard, of = local_head(weight)
        out = parallel_log_probs_from_hidden(x["hidden"], local, x["index"], of, shard=shard)
        (out * x["g"]).sum().backward()
        found[type(placement).__name__] = {
            "log_probs": out.detach(),
            "grad": weight.grad.full_tensor(),
            "placed": weight.grad.placements == (placement,),
            "shard": tuple(shard),
            "alone": of is None,
        }
    wrong = {
        "plain": x["weight"],
        "columns": distribute_tensor(x["weight"], mesh, [Shard(1)]),
        "empty": distribute_tensor(x["weight"][:1], mesh, [Shard(0)]),
        "mesh": distribute_tensor(
            x["weight"], init_device_mesh("cpu", (1, 2)), [Replicate(), Shard(0)]
        ),
    }
    for name, weight in wrong.items():
        try:
            local_head(weight)
        except (TypeError, ValueError) as error:
            found[name] = repr(error)
    return found


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(WIDTH, WIDTH, dtype=F64)
        self.head = torch.nn.Linear(WIDTH, SIZE, bias=False, dtype=F64)
        x = drawn(seed=1)
        with torch.no_grad():
            self.body.weight.copy_(x["weight"][:WIDTH])
            self.body.bias.copy_(x["bias"][:WIDTH])
            self.head.weight.copy_(x["weight"])

    def forward(self, x):
        return self.body(x)


def fsdp_loss(model, x, own, weight, normalizer):
    return ppo_loss_from_hidden(
        model(x["hidden"][own]).tanh(),
        weight,
        x["index"][own],
        x["old_log_probs"][own],
        x["advantages"][own],
        clip_coef=0.2,
        ent_coef=0.1,
        normalizer=normalizer,
    ).loss


def fsdp(rank):
    """Gradients of a model whose body and head FSDP2 shards, each process with rows of its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    x, found = drawn(), {}
    own = slice(0, 4) if rank == 0 else slice(4, ROWS)
    for reduce in ("sum", "avg"):
        model, mesh = Model(), init_device_mesh("cpu", (2,))
        fully_shard(model.body, mesh=mesh)
        fully_shard(model.head, mesh=mesh)
        # The default, a mean over processes, takes twice the share of each.
        factor = 2.0 if reduce == "avg" else 1.0
        if reduce == "sum":
            model.body.set_gradient_divide_factor(1.0)
        weight = full_head(model.head.weight, reduce=reduce)
        fsdp_loss(model, x, own, weight, ROWS / factor).backward()
        found[reduce] = {
            name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()
        }
        model.head.weight.requires_grad_(False)
        frozen = full_head(model.head.weight, reduce=reduce)
        found[f"{reduce}, frozen"] = frozen.requires_grad
    return found


def in_two_processes(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    part, group = PARTS[rank], dist.group.WORLD
    found = {
        "logits": {name: from_logits(name, part, group) for name in CASES},
        "hidden": {name: from_hidden(name, part, group) for name in CASES},
        "loss": {name: loss(name, part, group) for name in LOSSES},
        "sink": loss("every option", part, group, sink=True),
        "float32": from_hidden("every option", part, group, torch.float32),
        "bfloat16": from_hidden("every option", part, group, torch.bfloat16),
        "collectives": collectives(part, group),
        "meshes": tensors_over_meshes(rank, group),
        "fsdp": fsdp(rank),
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    mp.spawn(in_two_processes, args=(port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def whole(results):
    """What two processes found as one: the parts put together, the rest the same on both."""
    joined = {}
    for name, first in results[0].items():
        second = results[1][name]
        if name in ("grad weight", "grad bias", "buffer"):
            joined[name] = torch.cat((first, second))
        elif name == "grad logits":
            joined[name] = torch.cat((first, second), -1)
        else:
            assert torch.equal(first.nan_to_num(7.0), second.nan_to_num(7.0)), name
            joined[name] = first
    return joined


def assert_same(found, expected, rtol=1e-9, atol=1e-10):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name],
            value,
            rtol=rtol,
            atol=atol,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("name", CASES)
def test_log_probs_from_logits_are_those_of_one_process(found, name):
    assert_same(whole([result["logits"][name] for result in found]), from_logits(name))


@pytest.mark.parametrize("name", CASES)
def test_log_probs_from_hidden_are_those_of_one_process(found, name):
    assert_same(whole([result["hidden"][name] for result in found]), from_hidden(name))


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_and_its_gradients_are_those_of_one_process(found, name):
    assert_same(whole([result["loss"][name] for result in found]), loss(name))


def test_they_are_what_autograd_finds(found):
    x = drawn()
    leaves = {key: leaf(x[key]) for key in ("hidden", "weight", "bias")}
    logits = 0.5 * (leaves["hidden"] @ leaves["weight"].t() + leaves["bias"])
    log_p = torch.log_softmax(3.0 * torch.tanh(logits / 3.0) / 0.7, -1)
    log_probs = log_p.gather(1, x["index"].unsqueeze(1)).squeeze(1) * x["mask"]
    entropy = -(log_p.exp() * log_p).sum(1) * x["mask"]
    expected = differentiated((log_probs, entropy), (x["g"], x["h"]), leaves)
    for name in ("every option", "small workspace"):
        assert_same(whole([result["hidden"][name] for result in found]), expected)


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 2e-5), ("bfloat16", 2e-2)])
def test_lower_precision_stays_close(found, dtype, rtol):
    result = whole([result[dtype] for result in found])
    assert result["log_probs"].dtype is torch.float32
    assert result["grad weight"].dtype is getattr(torch, dtype)
    expected = from_hidden("every option")
    for name, value in expected.items():
        error = (result[name].double() - value).abs().max()
        assert error < 2 * rtol * value.abs().max(), name


def test_a_buffer_takes_the_gradient_of_the_local_weight(found):
    result = whole([{"buffer": result["sink"]["buffer"]} for result in found])
    assert all(result["sink"]["grad weight"] is None for result in found)
    expected = loss("every option")["grad weight"] / 3.0
    torch.testing.assert_close(result["buffer"], 1.0 + expected, rtol=1e-9, atol=1e-10)


def test_four_numbers_a_row_are_gathered_and_the_hidden_gradient_summed(found):
    gather, reduce = ("all_gather", [4, ROWS, 1]), ("all_reduce", [ROWS, WIDTH])
    for rank, result in enumerate(found):
        counted = result["collectives"]
        assert counted["shard"] == (rank * CUT, SIZE)
        assert counted["logits"] == ([gather], [])
        assert counted["hidden"] == ([gather], [reduce])
        assert counted["loss"] == ([gather, reduce], [])
        assert counted["loss, hidden constant"] == ([gather], [])


def test_an_index_that_no_process_has_raises_on_all(found):
    for result in found:
        assert "expected 0 to 36" in result["collectives"]["error"]


@pytest.mark.parametrize("placement", ["Shard", "Replicate"])
def test_a_dtensor_gets_its_gradient_back_placed_as_it_is(found, placement):
    x = drawn()
    weight = leaf(x["weight"])
    expected = log_probs_from_hidden(x["hidden"], weight, x["index"])
    (expected * x["g"]).sum().backward()
    for rank, result in enumerate(found):
        of = result["meshes"][placement]
        torch.testing.assert_close(of["log_probs"], expected.detach(), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(of["grad"], weight.grad, rtol=1e-9, atol=1e-10)
        assert of["placed"]
        assert of["alone"] == (placement == "Replicate")
        assert of["shard"] == (19 * rank if placement == "Shard" else 0, SIZE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plain", "TypeError.*weight is a Tensor; expected a DTensor"),
        ("columns", r"ValueError.*redistribute\(placements=\[Shard\(0\)\]\)"),
        ("empty", "ValueError.*1 rows over 2 processes"),
        ("mesh", "ValueError.*mesh of 2 dimensions"),
    ],
)
def test_a_weight_laid_out_otherwise_is_refused(found, name, message):
    for result in found:
        assert re.search(message, result["meshes"][name])


@pytest.mark.parametrize("reduce", ["sum", "avg"])
def test_gradients_under_fsdp_are_those_of_one_process(found, reduce):
    model, x = Model(), drawn()
    fsdp_loss(model, x, slice(None), model.head.weight, ROWS).backward()
    for result in found:
        for name, parameter in model.named_parameters():
            got = result["fsdp"][reduce][name]
            torch.testing.assert_close(got, parameter.grad, rtol=1e-9, atol=1e-10)
        assert result["fsdp"][f"{reduce}, frozen"] is False


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("trained", "options", "products"),
    [
        (("hidden", "weight"), {}, 3),
        (("hidden",), {}, 2),
        (("weight",), {}, 2),
        ((), {}, 1),
        (("hidden", "weight"), SMALL, 4 * 3),
        (("hidden",), SMALL, 3 * 3),
    ],
)
def test_a_frozen_weight_costs_no_product(trained, options, products):
    x = drawn()
    given = [leaf(x[key]) if key in trained else x[key] for key in ("hidden", "weight")]
    with Products() as counted:
        result = parallel_ppo_loss_from_hidden(
            *given, x["index"], x["old_log_probs"], x["advantages"], None, clip_coef=0.2, **options
        )
        if trained:
            result.loss.backward()
    assert counted.number == products


def test_a_frozen_weight_has_no_product_in_the_backward_of_log_probs():
    x = drawn()
    numbers = []
    for frozen in (True, False):
        hidden, weight = leaf(x["hidden"]), x["weight"] if frozen else leaf(x["weight"])
        out = parallel_log_probs_from_hidden(hidden, weight, x["index"], None)
        with Products() as counted:
            out.sum().backward()
        numbers.append(counted.number)
    assert numbers == [2, 3]


def test_one_process_alone_needs_no_process_group():
    x = drawn()
    log_probs = parallel_log_probs_from_logits(x["logits"], x["index"], None)
    torch.testing.assert_close(log_probs, log_probs_from_logits(x["logits"], x["index"]))
    assert vocab_shard(7, None, torch.device("cpu")) == VocabShard(0, 7)
    assert full_head(x["weight"]) is x["weight"]


def test_a_second_derivative_is_refused():
    x = drawn()
    logits, hidden = leaf(x["logits"]), leaf(x["hidden"])
    for x_, out in (
        (logits, parallel_log_probs_from_logits(logits, x["index"], None)),
        (hidden, parallel_log_probs_from_hidden(hidden, x["weight"], x["index"], None)),
    ):
        with pytest.raises(NotImplementedError, match="create_graph"):
            torch.autograd.grad(out.sum(), x_, create_graph=True)


@pytest.fixture(params=["blocks of rows", "nothing may be read"])
def way(request, monkeypatch):
    """Other ways of evaluating, in this process."""
    if request.param == "blocks of rows":
        monkeypatch.setattr(_rows, "CPU_BLOCK_ELEMENTS", 2 * SIZE)
    else:
        monkeypatch.setattr(module, "may_read", lambda device: False)


@pytest.mark.parametrize("name", CASES)
def test_every_way_of_evaluating_finds_the_same(way, name):
    everything = slice(0, SIZE), None
    assert_same(from_logits(name, *everything), from_logits(name))
    assert_same(from_hidden(name, *everything), from_hidden(name))


@pytest.mark.parametrize("name", LOSSES)
def test_every_way_of_evaluating_finds_the_same_loss(way, name):
    assert_same(loss(name, slice(0, SIZE), None), loss(name))


def test_where_asking_would_wait_an_index_out_of_range_is_nan(monkeypatch):
    monkeypatch.setattr(module, "may_read", lambda device: False)
    x = drawn()
    x["index"][3] = SIZE
    logits = leaf(x["logits"])
    shard = VocabShard(0, SIZE)
    log_probs = parallel_log_probs_from_logits(logits, x["index"], None, shard=shard)
    assert log_probs.isnan().nonzero().flatten().tolist() == [3]
    (log_probs * (torch.arange(ROWS) != 3)).nan_to_num().sum().backward()
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": torch.zeros(3)}, r"index is \[3\]"),
        ({"index": torch.zeros(ROWS)}, "index is torch.float32"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"mask": torch.ones(ROWS)}, "mask is"),
        ({"shard": VocabShard(30, SIZE)}, "vocab_shard"),
    ],
)
def test_bad_input_is_refused(change, message):
    x = drawn()
    given = {"index": x["index"], "group": None} | change
    with pytest.raises(ValueError, match=message):
        parallel_log_probs_from_logits(x["logits"], **given)
    with pytest.raises(ValueError, match=message):
        parallel_log_probs_from_hidden(x["hidden"], x["weight"], **given)


def test_bad_terms_of_the_loss_are_refused():
    x = drawn()
    given = x["hidden"], x["weight"], x["index"], x["old_log_probs"], x["advantages"], None
    with pytest.raises(ValueError, match="kl_coef is given but ref_log_probs is None"):
        parallel_ppo_loss_from_hidden(*given, clip_coef=0.2, kl_coef=0.1)
    with pytest.raises(ValueError, match="weight_grad is"):
        parallel_ppo_loss_from_hidden(*given, clip_coef=0.2, weight_grad=torch.zeros(3))
    with pytest.raises(ValueError, match="reduce is 'mean'"):
        full_head(x["weight"], reduce="mean")
