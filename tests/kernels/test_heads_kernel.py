"""The `ppo_loss` kernels of small heads: categorical, multi-discrete, Gaussian."""

import itertools
import math
import tempfile

import pytest
import torch
from calls import Call, assert_agrees, assert_as_exact_as_torch, run
from cases_heads import ALL, CASES, EVERYTHING, VALUE, categorical, gaussian, special
from cases_ppo_loss import loss

from ppo_fast.device_errors import _marks, raise_device_errors
from ppo_fast.dispatch import backend
from ppo_fast.functional.ppo_loss import ppo_loss_from_gaussian, ppo_loss_from_logits
from ppo_fast.kernels import _heads, _surrogate
from ppo_fast.kernels._launch import INTERPRETED, recorded
from ppo_fast.results import PPO_STATS

pytestmark = pytest.mark.filterwarnings("ignore:overflow|invalid value|All-NaN:RuntimeWarning")


def same_bits(first, second) -> None:
    for x, y in zip(first, second, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def gradients(call, upstream: float = 1.0, name: str = "triton"):
    """Loss, and gradients by all arguments that require them under an upstream gradient."""
    tensors = [x for x in (*call.args, *call.kwargs.values()) if isinstance(x, torch.Tensor)]
    leaves = [x for x in tensors if x.requires_grad]
    with backend(name):
        result = call.op(*call.args, **call.kwargs)
    return result.loss.detach(), *torch.autograd.grad(result.loss, leaves, torch.tensor(upstream))


def with_args(call, **by_position):
    args = list(call.args)
    for position, x in by_position.items():
        args[int(position[1:])] = x
    return call._replace(args=tuple(args))


def with_options(call, **options):
    return call._replace(kwargs=call.kwargs | options)


@pytest.mark.parametrize("name", CASES)
def test_kernel_and_reference_agree(name):
    assert_agrees(CASES[name]())


@pytest.mark.parametrize(
    "name",
    [
        *("categorical: everything, masked", "three heads: everything, masked", "many heads"),
        *("gaussian: everything, masked", "gaussian, per row: everything, masked"),
        *("squashed", "squashed, per row", "gaussian, 21", "gaussian, 64", "100 actions, masked"),
        *("far logits", "bf16", "fp16", "three heads, bf16", "gaussian, bf16", "gaussian, fp16"),
    ],
)
def test_the_error_is_no_more_than_twice_pytorchs(name):
    # The interpreter cuts float32 to bfloat16 off, where a GPU and PyTorch round.
    cut = INTERPRETED and "bf16" in name
    assert_as_exact_as_torch(CASES[name](), floor=8e-3 if cut else 2e-6)


@pytest.mark.parametrize("M", [1, 3, 130])
@pytest.mark.parametrize("A", [2, 6, 33])
def test_any_shape(M, A):
    assert_agrees(categorical(M, (A,), *VALUE, ent_coef=0.1))
    assert_agrees(gaussian(M, A, *VALUE, ent_coef=0.1))


OPTIONS = {
    "values": ("values", "returns"),
    "ref_log_probs": ("ref_log_probs",),
    "weights": ("weights",),
}


@pytest.mark.parametrize("given", itertools.product((False, True), repeat=4))
def test_any_combination_of_options(given):
    values, ref, weights, masked = given
    on = values != weights
    names = [
        name for key, flag in zip(OPTIONS, given, strict=False) if flag for name in OPTIONS[key]
    ]
    options = {"ent_coef": 0.1, "dual_clip": 1.5, "kl_coef": 0.1 if ref else 0.0} if on else {}
    assert_agrees(categorical(20, (5,), *names, masked=masked, **options))
    assert_agrees(gaussian(20, 3, *names, masked=masked, squash=values, per_row=weights, **options))


def test_no_rows():
    for call in (
        categorical(0, (4,), *VALUE, ent_coef=0.1),
        categorical(0, (2, 3), norm_adv=True),
        gaussian(0, 3, *VALUE, ent_coef=0.1),
        gaussian(0, 3, per_row=True, squash=True),
    ):
        assert_agrees(call)
        value, *found = gradients(call)
        assert value == 0.0
        assert not any(x.any() for x in found)


def enumerated(sizes: tuple[int, ...], states: int):
    """Every joint action of a few states: logits, actions [states, joint, heads], old, advantages."""
    logits = torch.randn(states, sum(sizes))
    joint = torch.tensor(list(itertools.product(*map(range, sizes))))
    actions = joint.expand(states, *joint.shape)
    old_logits = (logits + 0.5 * torch.randn_like(logits)).double()
    old = sum(
        x.log_softmax(-1).gather(-1, a)
        for x, a in zip(
            old_logits.split(sizes, -1), joint.T.expand(states, -1, -1).unbind(1), strict=True
        )
    )
    return logits, actions, old, torch.randn(old.shape, dtype=torch.float64)


@pytest.mark.parametrize("sizes", [(5,), (2, 3, 2)])
def test_the_gradient_is_that_of_the_expectation_over_all_actions(sizes):
    temperature, epsilon, bonus = 0.8, 0.2, 0.05
    logits, actions, old, advantages = enumerated(sizes, 6)
    exact = logits.double().requires_grad_()
    log_probs, entropy = 0.0, 0.0
    for x, a in zip(exact.split(sizes, -1), actions.unbind(-1), strict=True):
        log_p = (x / temperature).log_softmax(-1)
        log_probs = log_probs + log_p.gather(-1, a)
        entropy = entropy - (log_p.exp() * log_p).sum(-1)
    ratio = (log_probs - old).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)
    objective = (old.exp() * gain).sum(1).mean() + bonus * entropy.mean()
    (expected,) = torch.autograd.grad(-objective, exact)

    leaf = logits.requires_grad_()
    with backend("triton"):
        result = ppo_loss_from_logits(
            leaf.unsqueeze(1).expand(-1, old.shape[1], -1),
            actions if len(sizes) > 1 else actions.squeeze(-1),
            old.float(),
            advantages.float(),
            head_sizes=sizes if len(sizes) > 1 else None,
            temperature=temperature,
            weights=old.exp().float(),
            normalizer=len(logits),
            clip_coef=epsilon,
            ent_coef=bonus,
        )
    result.loss.backward()
    torch.testing.assert_close(result.loss.double(), -objective, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_the_gaussian_gradient_is_that_of_the_formula(squash, per_row):
    call = gaussian(40, 3, squash=squash, per_row=per_row, ent_coef=0.1, clip_coef=0.2)
    _, *found = gradients(call)
    mean, log_std, actions, old, advantages = (x.detach().double() for x in call.args)
    mean, log_std = mean.requires_grad_(), log_std.requires_grad_()
    policy = torch.distributions.Normal(mean, log_std.exp())
    log_probs = policy.log_prob(actions).sum(-1)
    entropy = policy.entropy().sum(-1)
    if squash:
        log_probs = log_probs - (1 - actions.tanh().square()).log().sum(-1)
        entropy = -log_probs
    ratio = (log_probs - old).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    expected = torch.autograd.grad(-(gain + 0.1 * entropy).mean(), (mean, log_std))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("log_std", [-20.0, -5.0, 2.0])
@pytest.mark.parametrize("u", [0.0, 1e-4, 8.0, -30.0, 1000.0])
def test_far_actions_and_narrow_policies(log_std, u):
    actions = torch.tensor([[u, 0.1], [0.3, -u]])
    mean = actions + torch.randn(2, 2) * math.exp(log_std)
    for squash in (False, True):
        args = mean.requires_grad_(), torch.full((2,), log_std).requires_grad_(), actions
        call = gaussian(2, 2, squash=squash, ent_coef=0.1)
        call = call._replace(args=(*args, torch.zeros(2), torch.ones(2)))
        ours = run(call, "triton")[0][1][[2, 5]]
        theirs = run(call, "reference")[0][1][[2, 5]]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert_agrees(call)


@pytest.mark.parametrize("name", ["three heads", "gaussian", "bf16"])
@pytest.mark.parametrize("upstream", [2.5, 0.0])
def test_the_upstream_gradient_multiplies(name, upstream):
    call = CASES[name]()
    _, *once = gradients(call)
    _, *found = gradients(call, upstream)
    for x, y in zip(once, found, strict=True):
        torch.testing.assert_close(x * upstream, y, rtol=1e-2 if name == "bf16" else 1e-6, atol=0)
    if upstream == 0.0:
        assert not any(x.any() for x in found)


def test_small_fp16_gradients_survive_until_a_loss_scale_multiplies_them():
    call = categorical(2, (4,), dtype=torch.float16, normalizer=1e6, clip_coef=9.0)
    half = gradients(call, 2.0**20)[1]
    exact = gradients(with_args(call, _0=call.args[0].detach().float().requires_grad_()), 2.0**20)[
        1
    ]
    torch.testing.assert_close(half.float(), exact, rtol=2e-3, atol=1e-6)
    assert half.all()


@pytest.mark.parametrize("name", ["three heads", "gaussian"])
def test_backward_twice_gives_the_same(name):
    call = CASES[name]()
    with backend("triton"):
        value = call.op(*call.args, **call.kwargs).loss
    leaves = [*(x for x in call.args if x.requires_grad), call.kwargs["values"]]
    same_bits(
        torch.autograd.grad(value, leaves, retain_graph=True), torch.autograd.grad(value, leaves)
    )


@pytest.mark.parametrize("name", ["three heads", "gaussian"])
def test_the_gradient_is_not_differentiable(name):
    call = CASES[name]()
    with backend("triton"):
        value = call.op(*call.args, **call.kwargs).loss
    with pytest.raises(NotImplementedError, match=r"ppo_loss_from_\w+: .*create_graph"):
        torch.autograd.grad(value, call.args[0], create_graph=True)


@pytest.mark.parametrize(
    "name", ["three heads: everything, masked", "many heads", "gaussian: everything, masked"]
)
def test_the_same_call_gives_the_same_bits(name):
    call = CASES[name]()
    same_bits(gradients(call), gradients(call))


@pytest.mark.parametrize("make", [categorical, gaussian])
def test_the_number_of_launches(make, monkeypatch):
    call = make(5, (4,) if make is categorical else 4, *ALL, masked=True, norm_adv=True)
    with backend("triton"), recorded() as launches:
        call.op(*call.args, **call.kwargs).loss.backward()
    assert len(launches) == 1
    monkeypatch.setattr(_surrogate, "WHITEN_IN_PLACE_ROWS", 4)
    with backend("triton"), recorded() as launches:
        call.op(*call.args, **call.kwargs)
    assert len(launches) == 2


@pytest.mark.parametrize("make", [categorical, gaussian])
@pytest.mark.parametrize("masked", [False, True])
def test_moments_by_a_launch_of_their_own(make, masked, monkeypatch):
    monkeypatch.setattr(_surrogate, "WHITEN_IN_PLACE_ROWS", 4)
    assert_agrees(make(1100, (2,) if make is categorical else 2, masked=masked, norm_adv=True))


@pytest.mark.parametrize("programs", [1, 2, 3, 100])
def test_any_number_of_programs_gives_the_same(programs, monkeypatch):
    for call in (
        categorical(530, (3,), *ALL, masked=True, **EVERYTHING),
        gaussian(530, 3, *ALL, masked=True, **EVERYTHING),
    ):
        monkeypatch.setattr(_heads, "PROGRAMS", (programs, programs))
        assert_agrees(call)


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_heads_read_again_give_the_same_as_heads_kept(kept, monkeypatch):
    call = categorical(40, (3, 4, 5), *ALL, masked=True, illegal=True, **EVERYTHING)
    first = gradients(call)
    monkeypatch.setattr(_heads, "HEADS_IN_REGISTERS", kept)
    for x, y in zip(first, gradients(call), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [-1, 3, 4, 2**31, 2**32])
def test_an_action_out_of_its_head_is_marked_and_makes_its_row_nan(bad, monkeypatch):
    call = categorical(20, (4, 3, 5), ent_coef=0.1)
    actions = call.args[1].clone()
    actions[7, 1] = bad
    call = with_args(call, _1=actions)
    for kept in (8, 0):
        monkeypatch.setattr(_heads, "HEADS_IN_REGISTERS", kept)
        raise_device_errors()
        value, found = gradients(call)
        assert value.isnan()
        assert found.isnan().any(1).nonzero().flatten().tolist() == [7]
        with pytest.raises(IndexError, match="ppo_loss_from_logits: an action lies outside"):
            raise_device_errors()
        value, found = gradients(with_options(call, mask=torch.arange(20) != 7))
        assert value.isfinite()
        assert not found[7].any()
        raise_device_errors()


def test_what_an_illegal_logit_holds_does_not_matter():
    call = CASES["three heads: everything, masked"]()
    first = gradients(call)
    legal = call.kwargs["action_mask"] & call.kwargs["mask"].unsqueeze(1)
    for value in (0.0, math.inf, -math.inf, 1e30):
        other = call.args[0].detach().masked_fill(~legal, value).requires_grad_()
        same_bits(first, gradients(with_args(call, _0=other)))
    assert not first[1][~legal].any()
    assert first[1][legal].any()


@pytest.mark.parametrize("rule", ["nothing legal", "nothing legal by the mask"])
def test_a_row_without_a_legal_action_counts_and_has_no_gradient(rule):
    call = special(rule)
    with backend("triton"):
        result = call.op(*call.args, **call.kwargs)
    assert result.stats[PPO_STATS.index("count")] == 60
    assert not gradients(call)[1][::3].any()
    mask = torch.arange(60) % 3 == 0
    with backend("triton"):
        stats = call.op(*call.args, **call.kwargs | {"mask": mask}).stats
    assert stats[PPO_STATS.index("entropy")] == 0.0


def test_a_masked_illegal_action_taken_under_the_old_policy_too():
    call = special("illegal actions taken")
    old = call.args[2].clone()
    old[::3] = -1e9
    assert_agrees(with_args(call, _2=old))


def test_log_probs_are_never_positive():
    logits = torch.tensor([[300.0, 0.0, -300.0], [40.0, 1.0, 1.0], [1e30, 0.0, 0.0]])
    call = categorical(3, (3,))
    call = call._replace(args=(logits, torch.zeros(3, dtype=torch.int64), *call.args[2:]))
    call = with_args(call, _2=torch.zeros(3))
    with backend("triton"):
        stats = call.op(*call.args, **call.kwargs).stats
    assert stats[PPO_STATS.index("old_approx_kl")] >= 0.0


def test_each_row_of_the_gradient_adds_up_to_nothing():
    found = gradients(categorical(20, (18,), *ALL, **EVERYTHING))[1]
    assert (found.double().sum(1).abs() <= 3e-8).all()
    assert found.any(1).all()


def test_a_log_std_expanded_over_rows():
    parameter = torch.randn(3, requires_grad=True)
    call = gaussian(40, 3, ent_coef=0.1)

    def gradient(name):
        with backend(name):
            call.op(
                *(call.args[0], parameter.expand(40, 3), *call.args[2:]), **call.kwargs
            ).loss.backward()
        found, parameter.grad = parameter.grad, None
        return found

    torch.testing.assert_close(gradient("triton"), gradient("reference"), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        gradient("triton"), gradients(with_args(call, _1=parameter))[2], rtol=1e-5, atol=1e-7
    )


def columns(x):
    """The same vector as one of a matrix's columns."""
    wide = torch.stack((x.detach(), torch.full_like(x, 1), torch.zeros_like(x)), 1)
    return wide[:, 0].requires_grad_(x.requires_grad)


@pytest.mark.parametrize("make", [categorical, gaussian, loss])
def test_row_tensors_that_are_columns_of_something(make):
    size = {categorical: ((4,),), gaussian: (2,), loss: ()}[make]
    names = (*ALL, "entropy") if make is loss else ALL
    call = make(30, *size, *names, masked=True, **EVERYTHING)
    rows = {k: columns(x) if isinstance(x, torch.Tensor) else x for k, x in call.kwargs.items()}
    args = tuple(columns(x) if x.dim() == 1 and len(x) == 30 else x for x in call.args)
    assert_agrees(call._replace(args=args, kwargs=rows))


def test_an_action_mask_for_all_rows():
    legal = torch.tensor([True, False, True, True])
    call = categorical(30, (4,), ent_coef=0.1)
    actions = torch.where(call.args[1] == 1, 0, call.args[1])
    assert_agrees(with_options(with_args(call, _1=actions), action_mask=legal.expand(30, 4)))


@pytest.mark.parametrize("offset", [0, 1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logits_beside_a_value_in_one_buffer(offset, dtype):
    call = categorical(30, (4,), ent_coef=0.1, dtype=dtype)
    buffer = torch.randn(30, 9).to(dtype)
    buffer[:, offset : offset + 4] = call.args[0].detach()
    assert_agrees(with_args(call, _0=buffer[:, offset : offset + 4].requires_grad_()))


def test_leading_dimensions_transposed():
    call = CASES["time-major"]()

    def turn(x):
        many = isinstance(x, torch.Tensor) and x.dim() >= 3
        return x.detach().transpose(0, 1).requires_grad_(x.requires_grad) if many else x

    assert_agrees(
        call._replace(
            args=tuple(map(turn, call.args)), kwargs={k: turn(x) for k, x in call.kwargs.items()}
        )
    )


def test_rows_more_than_2_to_the_31_logits_apart():
    # A sparse file: only what is touched takes up memory.
    call, stride = categorical(3, (4,), ent_coef=0.1), 2**30 + 4
    with tempfile.NamedTemporaryFile() as file:
        storage = torch.UntypedStorage.from_file(file.name, True, 4 * (2 * stride + 4))
        logits = torch.empty(0, device="cpu").set_(storage, 0, (3, 4), (stride, 1))
        logits.copy_(call.args[0].detach())
        same_bits(gradients(with_args(call, _0=logits.requires_grad_())), gradients(call))


def test_no_gradient_is_written_where_none_is_asked_for():
    for call in (categorical(5, (4,), *VALUE), gaussian(5, 4, *VALUE)):
        with backend("triton"), torch.no_grad(), recorded() as launches:
            assert not call.op(*call.args, **call.kwargs).loss.requires_grad
        names = launches[0].kernel.arg_names
        written = [n for n, x in zip(names, launches[0].args, strict=False) if x is not None]
        assert not [n for n in written if n.startswith("grad_")]


def test_vmap_is_refused():
    call = categorical(5, (4,))
    stacked = [torch.stack((x.detach(), x.detach())) for x in call.args]
    with backend("triton"), pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(lambda *args: call.op(*args, **call.kwargs))(*stacked)


@pytest.mark.parametrize("op", [ppo_loss_from_logits, ppo_loss_from_gaussian])
def test_float64_runs_on_the_reference(op):
    call = categorical(3, (4,)) if op is ppo_loss_from_logits else gaussian(3, 4)
    args = (call.args[0].detach().double(), *call.args[1:])
    assert "float64" in op.kernel.unsupported(*args, **call.kwargs)


def test_compiles_to_one_graph():
    call = CASES["three heads"]()
    first = gradients(call)
    compiled = torch.compile(call.op, fullgraph=True, backend="aot_eager")
    same_bits(first, gradients(call._replace(op=compiled)))


def test_float64_by_keyword_is_float64():
    x = torch.randn(5, 4, dtype=torch.float64)
    rows = {"old_log_probs": torch.zeros(5), "advantages": torch.ones(5), "clip_coef": 0.2}
    op = ppo_loss_from_logits
    why = op.why_not_kernel(logits=x, actions=torch.zeros(5, dtype=torch.int64), **rows)
    assert why == "float64 tensors run on the reference"


def test_head_sizes_may_be_numpy_integers():
    sizes = tuple(torch.tensor([2, 3]).cpu().numpy())
    args = torch.randn(5, 5).requires_grad_(), torch.zeros(5, 2, dtype=torch.int64)
    rows = torch.zeros(5), torch.ones(5)
    kwargs = {"clip_coef": 0.2, "head_sizes": sizes}
    assert_agrees(Call(ppo_loss_from_logits, (*args, *rows), kwargs))


def test_a_squashed_action_of_many_dimensions_near_0_does_not_overflow():
    A = 512
    args = torch.zeros(2, A), torch.zeros(A), torch.zeros(2, A), torch.zeros(2), torch.ones(2)
    assert_agrees(Call(ppo_loss_from_gaussian, args, {"clip_coef": 0.2, "squash": True}))


def test_a_mark_made_in_inference_mode_can_be_cleared():
    _marks.clear()
    actions = torch.tensor([0, 9])
    with torch.inference_mode(), backend("triton"):
        ppo_loss_from_logits(
            torch.randn(2, 4), actions, torch.zeros(2), torch.ones(2), clip_coef=0.2
        )
    with pytest.raises(IndexError, match="outside its head"):
        raise_device_errors()
    raise_device_errors()
