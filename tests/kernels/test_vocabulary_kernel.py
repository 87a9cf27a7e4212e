"""`ppo_loss_from_logits` with a large vocabulary: one kernel, one gradient buffer."""

import math
import tempfile

import pytest
import torch
from calls import assert_agrees, assert_as_exact_as_torch, run
from cases_vocabulary import ALL, CASES, EVERYTHING, changed, loss

from ppo_fast.device_errors import raise_device_errors
from ppo_fast.dispatch import backend
from ppo_fast.functional.log_probs import log_probs_from_logits
from ppo_fast.functional.ppo_loss import ppo_loss
from ppo_fast.kernels import _vocabulary
from ppo_fast.kernels._launch import INTERPRETED, recorded
from ppo_fast.results import PPO_STATS

pytestmark = pytest.mark.filterwarnings("ignore:overflow|invalid value|All-NaN:RuntimeWarning")


SHORT = [name for name in CASES if CASES[name]().args[0].shape[-1] <= _vocabulary.SHORT]


@pytest.fixture(params=[True, False], ids=["held whole", "swept"])
def both_kernels(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(_vocabulary, "SHORT", 0)


def gradients(call, upstream=1.0, name="triton"):
    """Loss, and its gradient by the logits under an upstream gradient."""
    logits = call.args[0].detach().requires_grad_()
    with backend(name):
        result = call.op(logits, *call.args[1:], **call.kwargs)
    result.loss.backward(torch.tensor(upstream))
    return result.loss.detach(), logits.grad


@pytest.mark.parametrize("name", CASES)
def test_kernel_and_reference_agree(name):
    assert_agrees(CASES[name]())


@pytest.mark.parametrize("name", SHORT)
def test_short_rows_swept_like_long_ones_agree(name, monkeypatch):
    monkeypatch.setattr(_vocabulary, "SHORT", 0)
    assert_agrees(CASES[name]())


@pytest.mark.parametrize(
    "name", ["everything, masked", "everything, bf16", "everything, fp16", "tiles", "bf16"]
)
def test_the_error_is_no_more_than_twice_pytorchs(name):
    # The interpreter cuts float32 to bfloat16 off, where a GPU and PyTorch round.
    cut = INTERPRETED and "bf16" in name
    assert_as_exact_as_torch(CASES[name](), floor=8e-3 if cut else 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [130, 137, 255, 1024, 1025])
def test_any_number_of_logits(V, dtype):
    assert_agrees(loss(2, V, dtype=dtype, ent_coef=0.1))


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("V", [1000, 1100])
def test_programs_that_take_several_rows_give_the_same(V, programs, monkeypatch):
    call = loss(7, V, *ALL, masked=True, norm_adv=True, **EVERYTHING)
    outputs, found = run(call, "triton")
    for name, tile in (("_short", _vocabulary._short(V)), ("_tile", _vocabulary._tile(V, 4))):
        fewer = tile | {"programs": programs}
        monkeypatch.setattr(_vocabulary, name, lambda *_, fewer=fewer: fewer.copy())
    others, same = run(call, "triton")
    for x, y in zip(outputs, others, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    for x, y in zip(found, same, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_the_same_call_gives_the_same_bits():
    call = CASES["everything, bf16"]()
    for x, y in zip(run(call, "triton"), run(call, "triton"), strict=True):
        for mine, other in zip(x, y, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)


@pytest.mark.parametrize("V", [200, 5000, 10_000, 32_000, 50_257, 151_936, 256_000])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_rows_in_work_fit_the_cache(V, itemsize):
    tile = _vocabulary._tile(V, itemsize)
    each = tile["programs"] // _vocabulary.PROGRAMS
    assert each * tile["num_warps"] == 16
    assert each == 1 or tile["programs"] * V * itemsize <= 40 << 20


@pytest.mark.usefixtures("both_kernels")
def test_one_launch_forward_and_one_backward():
    call = loss(3, 200, *ALL, masked=True, norm_adv=True, **EVERYTHING)
    with backend("triton"), recorded() as launches:
        result = call.op(*call.args, **call.kwargs)
        assert len(launches) == 1
        result.loss.backward()
    assert [x.kernel.__name__ for x in launches] == [launches[0].kernel.__name__, "rescale_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("upstream", [1.0, 2.5, 0.0])
def test_the_upstream_gradient_multiplies(upstream, dtype):
    call = loss(3, 531, dtype=dtype, ent_coef=0.1)
    ours = gradients(call, upstream)[1]
    reference = gradients(call, upstream, "reference")[1]
    eps = torch.finfo(dtype).eps
    if INTERPRETED and dtype == torch.bfloat16:
        eps *= 2.0  # it is cut off there, not rounded
    bound = upstream * float(gradients(call, 1.0, "reference")[1].abs().max())
    torch.testing.assert_close(ours, reference, rtol=2 * eps, atol=2 * eps * bound)
    if upstream == 0.0:
        assert not ours.any()


def test_small_fp16_gradients_survive_until_a_loss_scale_multiplies_them():
    call = loss(1, 129, dtype=torch.float16, scale=0.01)
    call = changed(call, normalizer=1e6, clip_coef=9.0)
    ours = gradients(call, 2.0**20)[1]
    exact = gradients(call._replace(args=(call.args[0].float(), *call.args[1:])), 2.0**20)[1]
    torch.testing.assert_close(ours.float(), exact, rtol=2e-3, atol=1e-6)
    assert ours.all()


@pytest.mark.usefixtures("both_kernels")
def test_each_row_of_the_gradient_adds_up_to_nothing():
    found = gradients(loss(4, 2053, *ALL, **EVERYTHING))[1]
    # What 1 - p leaves of g / M.
    assert (found.double().sum(1).abs() <= 3e-8).all()
    assert found.any(1).all()


@pytest.mark.parametrize("masked", [False, True])
def test_it_is_log_probs_and_ppo_loss_together(masked):
    call = loss(5, 300, *ALL, masked=masked, norm_adv=True, **EVERYTHING)
    value, found = gradients(call)
    logits = call.args[0].detach().requires_grad_()
    given = dict(call.kwargs)
    mask = given.get("mask")
    with backend("triton"):
        log_probs, entropy = log_probs_from_logits(
            logits,
            call.args[1],
            temperature=given.pop("temperature"),
            mask=mask,
            with_entropy=True,
        )
        both = ppo_loss(log_probs, *call.args[2:], entropy=entropy, **given).loss
    both.backward()
    torch.testing.assert_close(value, both.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, logits.grad, rtol=1e-5, atol=1e-7)


def odd_rows(V: int) -> torch.Tensor:
    logits = torch.randn(6, V)
    logits[0, ::2] = -math.inf
    logits[1] = -math.inf
    logits[2, 7] = math.nan
    logits[3, V - 1] = math.inf
    logits[4] = -math.inf
    logits[4, 3] = 1.0
    return logits


@pytest.mark.parametrize("V", [129, 1027])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinities_and_nan(V, dtype):
    call = loss(6, V, ent_coef=0.1)
    logits = odd_rows(V).to(dtype)
    actions = torch.tensor([1, 3, 0, 5, 3, V - 1])
    old = torch.full((6,), -1.0)
    for drop in ([], [2], [2, 3]):
        mask = torch.ones(6, dtype=torch.bool)
        mask[drop] = False
        args = logits.detach().requires_grad_(), actions, old, call.args[3]
        assert_agrees(call._replace(args=args, kwargs=call.kwargs | {"mask": mask}))
    value, found = gradients(call._replace(args=(logits, actions, old, call.args[3])))
    assert value.isnan()
    assert found.isnan().all(1).tolist() == [False, False, True, True, False, False]
    assert found[[0, 1, 4, 5]].isfinite().all()
    assert not found[1].any()
    assert not found[0, ::2].any()


@pytest.mark.usefixtures("both_kernels")
def test_an_action_taken_though_illegal_has_log_prob_minus_1e9():
    call = loss(2, 150, "ref_log_probs", kl_coef=0.1)
    actions = call.args[1]
    logits = call.args[0].detach().clone()
    logits[torch.arange(2), actions] = -math.inf
    for old in (-1.0, -1e9):
        args = logits.requires_grad_(), actions, torch.full((2,), old), call.args[3]
        assert_agrees(call._replace(args=args))


@pytest.mark.usefixtures("both_kernels")
def test_an_action_mask_shared_by_all_rows():
    call = loss(6, 200, ent_coef=0.1)
    legal = torch.ones(200, dtype=torch.bool)
    legal[::7] = False
    actions = torch.tensor([1, 2, 3, 4, 5, 6])
    logits = call.args[0].detach().view(2, 3, 200).requires_grad_()
    args = logits, *(x.view(2, 3) for x in (actions, *call.args[2:]))
    assert_agrees(changed(call._replace(args=args), action_mask=legal.expand(2, 3, 200)))
    assert_agrees(
        changed(call._replace(args=args), action_mask=torch.rand(3, 2, 200).gt(-1).transpose(0, 1))
    )


@pytest.mark.usefixtures("both_kernels")
def test_what_an_illegal_logit_holds_does_not_matter():
    call = CASES["illegal, everything"]()
    first = gradients(call)
    legal = call.kwargs["action_mask"]
    for value in (0.0, math.inf, 1e30):
        other = call.args[0].detach().masked_fill(~legal, value)
        for x, y in zip(first, gradients(call._replace(args=(other, *call.args[1:]))), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)
    assert not first[1][~legal].any()


@pytest.mark.usefixtures("both_kernels")
def test_a_row_without_a_legal_action_counts_and_has_no_gradient():
    call = loss(3, 140, ent_coef=0.1)
    legal = torch.ones(3, 140, dtype=torch.bool)
    legal[1] = False
    call = changed(call, action_mask=legal)
    assert_agrees(call)
    with backend("triton"):
        result = call.op(*call.args, **call.kwargs)
    assert result.stats[PPO_STATS.index("count")] == 3
    assert not gradients(call)[1][1].any()


@pytest.mark.usefixtures("both_kernels")
@pytest.mark.parametrize("bad", [-1, 150, 2**32])
def test_an_action_out_of_range_is_marked_and_makes_its_row_nan(bad):
    call = loss(3, 150, ent_coef=0.1)
    actions = call.args[1].clone()
    actions[1] = bad
    raise_device_errors()
    value, found = gradients(call._replace(args=(call.args[0], actions, *call.args[2:])))
    assert value.isnan()
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()
    with pytest.raises(IndexError, match="ppo_loss_from_logits"):
        raise_device_errors()
    masked = changed(call, mask=torch.tensor([True, False, True]))
    value, _ = gradients(masked._replace(args=(call.args[0], actions, *call.args[2:])))
    assert value.isfinite()
    raise_device_errors()


def test_clipped_and_masked_rows_have_gradient_zero():
    mask = torch.tensor([True, False, True, True])
    found = gradients(changed(CASES["clipped rows"](), mask=mask))[1]
    assert found.any(1).tolist() == [False, False, False, True]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_actions_of_any_integer_type(dtype):
    call = loss(3, 200)
    assert_agrees(call._replace(args=(call.args[0], call.args[1].to(dtype), *call.args[2:])))


def test_actions_that_lie_apart():
    call = loss(3, 200)
    pairs = torch.stack((call.args[1], torch.full((3,), -5)), 1)
    assert_agrees(call._replace(args=(call.args[0], pairs[:, 0], *call.args[2:])))


def test_one_head_named_as_such():
    call = loss(3, 200, head_sizes=(200,))
    assert_agrees(call._replace(args=(call.args[0], call.args[1].unsqueeze(1), *call.args[2:])))


@pytest.mark.usefixtures("both_kernels")
def test_no_rows():
    assert_agrees(loss(0, 200, "values", "returns", ent_coef=0.1))


@pytest.mark.usefixtures("both_kernels")
def test_many_rows_are_counted_by_a_launch_of_their_own(monkeypatch):
    monkeypatch.setattr(_vocabulary, "WHITEN_IN_PLACE_ROWS", 2)
    assert_agrees(loss(5, 150, masked=True))


@pytest.mark.usefixtures("both_kernels")
def test_rows_more_than_2_to_the_31_logits_apart():
    # A sparse file: only what is touched takes up memory.
    call, stride = loss(3, 129, ent_coef=0.1), 2**30 + 4
    with tempfile.NamedTemporaryFile() as file:
        storage = torch.UntypedStorage.from_file(file.name, True, 4 * (2 * stride + 129))
        logits = torch.empty(0, device="cpu").set_(storage, 0, (3, 129), (stride, 1))
        logits.copy_(call.args[0].detach())
        ours = gradients(call._replace(args=(logits, *call.args[1:])))
    near = torch.empty(3, 132)[:, :129]
    near.copy_(call.args[0].detach())
    theirs = gradients(call._replace(args=(near, *call.args[1:])))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_a_retained_graph_gives_the_gradient_again():
    call = loss(2, 150)
    with backend("triton"):
        result = call.op(*call.args, **call.kwargs)
    (first,) = torch.autograd.grad(result.loss, call.args[0], torch.tensor(2.0), retain_graph=True)
    (again,) = torch.autograd.grad(result.loss, call.args[0], torch.tensor(1.0), retain_graph=True)
    (last,) = torch.autograd.grad(result.loss, call.args[0], torch.tensor(2.0))
    torch.testing.assert_close(first, 2 * again)
    torch.testing.assert_close(last, first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(result.loss, call.args[0])


def test_a_backward_for_the_values_leaves_the_logits_their_own():
    call = loss(2, 150, "values", "returns")
    values = call.kwargs["values"]
    expected = torch.autograd.grad(
        call.op(*call.args, **call.kwargs).loss, (call.args[0], values), torch.tensor(3.0)
    )
    with backend("triton"):
        result = call.op(*call.args, **call.kwargs)
    (of_values,) = torch.autograd.grad(result.loss, values, torch.tensor(3.0), retain_graph=True)
    (of_logits,) = torch.autograd.grad(result.loss, call.args[0], torch.tensor(3.0))
    torch.testing.assert_close((of_logits, of_values), expected)


def test_memory_brought_back_by_a_hook_is_not_written_to():
    call = loss(4, 200)
    arena = torch.ones(2400)

    def pack(x):
        if x.numel() != 800:
            return x
        arena[100:900].view(x.shape).copy_(x)
        return x.shape

    def unpack(x):
        return x if isinstance(x, torch.Tensor) else arena[100:900].view(x)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack), backend("triton"):
        value = call.op(*call.args, **call.kwargs).loss
    before = arena.clone()
    (gradient,) = torch.autograd.grad(value, call.args[0], torch.tensor(2.0))
    torch.testing.assert_close(arena, before, rtol=0, atol=0)
    (expected,) = torch.autograd.grad(
        call.op(*call.args, **call.kwargs).loss, call.args[0], torch.tensor(2.0)
    )
    torch.testing.assert_close(gradient, expected)


def test_the_gradient_is_not_differentiable():
    call = loss(2, 150)
    with backend("triton"):
        result = call.op(*call.args, **call.kwargs)
    with pytest.raises(NotImplementedError, match=r"ppo_loss_from_logits: .*create_graph"):
        torch.autograd.grad(result.loss, call.args[0], create_graph=True)


def test_without_gradient_nothing_of_the_logits_size_is_allocated():
    call = loss(2, 150, "values", "returns")
    with backend("triton"), torch.no_grad(), recorded() as launches:
        assert not call.op(*call.args, **call.kwargs).loss.requires_grad
    assert launches[0].args[9] is None
    # Of the values alone.
    args = call.args[0].detach(), *call.args[1:]
    assert_agrees(call._replace(args=args))


@pytest.mark.parametrize("name", ["everything, masked", "padded"])
def test_compiles_to_one_graph(name):
    call = CASES[name]()
    rest = {k: x for k, x in call.kwargs.items() if k != "values"}

    def op(logits, values):
        with backend("triton"):
            given = rest if values is None else rest | {"values": values}
            return call.op(logits, *call.args[1:], **given)

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    results = []
    for function in (op, compiled):
        logits = call.args[0].detach().requires_grad_()
        values = call.kwargs.get("values")
        values = None if values is None else values.detach().requires_grad_()
        result = function(logits, values)
        result.loss.backward(torch.tensor(2.5))
        results.append((result.loss, logits.grad, None if values is None else values.grad))
    for x, y in zip(*results, strict=True):
        if x is not None:
            torch.testing.assert_close(x, y, rtol=0, atol=0)
