import itertools

import pytest
import torch

from ppo_fast.functional.gae import gae, gae_packed

NAN = float("nan")


def oracle(rewards, values, next_value, terminated, truncated, bootstrap_values, mask, gamma, lam):
    """The definition, one column and one Python float at a time."""
    T, N = rewards.shape
    advantages = torch.zeros(T, N, dtype=torch.float64)
    returns = torch.zeros(T, N, dtype=torch.float64)
    for n in range(N):
        following_value, following_advantage = float(next_value[n]), 0.0
        for t in reversed(range(T)):
            if mask is not None and not mask[t, n]:
                continue
            value = float(values[t, n])
            if terminated[t, n]:
                target, carried = 0.0, 0.0
            elif truncated is not None and truncated[t, n]:
                target, carried = float(bootstrap_values[t, n]), 0.0
            else:
                target, carried = following_value, following_advantage
            delta = float(rewards[t, n]) + gamma * target - value
            advantage = delta + gamma * lam * carried
            advantages[t, n], returns[t, n] = advantage, advantage + value
            following_value, following_advantage = value, advantage
    return advantages, returns


def rollout(T, N, *, seed=0, dtype=torch.float32, done=0.1, skipped=0.2):
    """rewards, values, next_value, terminated, truncated, bootstrap_values, mask."""
    g = torch.Generator().manual_seed(seed)
    rewards, values, bootstrap_values = torch.randn(3, T, N, generator=g, dtype=dtype)
    next_value = torch.randn(N, generator=g, dtype=dtype)
    terminated = torch.rand(T, N, generator=g) < done
    truncated = torch.rand(T, N, generator=g) < done
    mask = torch.rand(T, N, generator=g) >= skipped
    return rewards, values, next_value, terminated, truncated, bootstrap_values, mask


def column(*numbers):
    return torch.tensor(numbers).unsqueeze(1)


def flag(*positions, length=3):
    return torch.isin(torch.arange(length), torch.tensor(positions)).unsqueeze(1)


HAND = {
    "rewards": column(1.0, 2, 3),
    "values": column(4.0, 5, 6),
    "next_value": torch.tensor([8.0]),
}


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        # deltas -0.5, 0, 1
        ({"terminated": flag()}, (-0.4375, 0.25, 1.0)),
        # deltas -0.5, 2 - 5, 1
        ({"terminated": flag(1)}, (-1.25, -3.0, 1.0)),
        # deltas -0.5, 2 + 10/2 - 5, 1
        (
            {
                "terminated": flag(),
                "truncated": flag(1),
                "bootstrap_values": column(NAN, 10.0, NAN),
            },
            (0.0, 2.0, 1.0),
        ),
        # row 0 is followed by row 2: deltas 1 + 6/2 - 4, -, 1
        ({"terminated": flag(), "mask": ~flag(1)}, (0.25, 0.0, 1.0)),
        # row 1 is followed by next_value: deltas -0.5, 2 + 8/2 - 5, -
        ({"terminated": flag(), "mask": ~flag(2)}, (-0.25, 1.0, 0.0)),
    ],
    ids=["no end", "terminated", "truncated", "middle row skipped", "last row skipped"],
)
def test_matches_numbers_worked_by_hand(case, expected):
    advantages, returns = gae(**HAND, **case, gamma=0.5, gae_lambda=0.5)
    assert advantages[:, 0].tolist() == list(expected)
    kept = case.get("mask", torch.ones(3, 1, dtype=torch.bool))
    assert torch.equal(returns, torch.where(kept, advantages + HAND["values"], 0.0))


@pytest.mark.parametrize(
    "shape", [(1, 1), (2, 1), (7, 3), (8, 2), (9, 2), (17, 5), (64, 3), (131, 4)]
)
@pytest.mark.parametrize("with_truncated", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_matches_the_definition(shape, with_truncated, with_mask):
    r, v, nv, term, trunc, boot, mask = rollout(*shape, seed=sum(shape), dtype=torch.float64)
    trunc, boot = (trunc, boot) if with_truncated else (None, None)
    mask = mask if with_mask else None
    expected = oracle(r, v, nv, term, trunc, boot, mask, 0.97, 0.9)
    actual = gae(r, v, nv, term, trunc, boot, mask, gamma=0.97, gae_lambda=0.9)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    single = [
        x.float() if x is not None and x.is_floating_point() else x
        for x in (r, v, nv, term, trunc, boot, mask)
    ]
    advantages, returns = gae(*single, gamma=0.97, gae_lambda=0.9)
    assert advantages.dtype == returns.dtype == torch.float32
    torch.testing.assert_close(
        (advantages.double(), returns.double()), expected, rtol=1e-5, atol=2e-6
    )


@pytest.mark.parametrize("gamma", [1.0, 0.97])
def test_lambda_one_is_the_discounted_return_with_one_bootstrap(gamma):
    T, N = 37, 5
    r, v, nv, term, trunc, boot, _ = rollout(T, N, dtype=torch.float64, done=0.05)
    _, returns = gae(r, v, nv, term, trunc, boot, gamma=gamma, gae_lambda=1.0)
    for n in range(N):
        for t in range(T):
            total, discount, k = 0.0, 1.0, t
            while True:
                total += discount * r[k, n]
                discount *= gamma
                if term[k, n]:
                    break
                if trunc[k, n] or k == T - 1:
                    total += discount * (boot[k, n] if trunc[k, n] else nv[n])
                    break
                k += 1
            torch.testing.assert_close(returns[t, n], total, rtol=1e-12, atol=1e-12)


def test_lambda_zero_is_the_td_error():
    r, v, nv, term, *_ = rollout(40, 6)
    advantages, _ = gae(r, v, nv, term, gamma=0.9, gae_lambda=0.0)
    following = torch.cat((v[1:], nv[None]))
    torch.testing.assert_close(advantages, r + 0.9 * following * ~term - v)


def test_gamma_zero_is_reward_minus_value():
    r, v, nv, term, *_ = rollout(40, 6)
    advantages, returns = gae(r, v, nv, term, gamma=0.0, gae_lambda=0.95)
    torch.testing.assert_close(advantages, r - v)
    torch.testing.assert_close(returns, r)


@pytest.mark.parametrize("position", range(20))
def test_an_end_splits_a_rollout_into_two_independent_ones(position):
    r, v, nv, _, _, boot, _ = rollout(20, 2, dtype=torch.float64)
    no_end = torch.zeros(20, 2, dtype=torch.bool)
    end = no_end.clone()
    end[position] = True
    cut = position + 1
    kw = {"gamma": 0.99, "gae_lambda": 0.95}
    later, _ = gae(r[cut:], v[cut:], nv, no_end[cut:], **kw)

    earlier, _ = gae(r[:cut], v[:cut], torch.zeros(2, dtype=torch.float64), no_end[:cut], **kw)
    advantages, _ = gae(r, v, nv, end, **kw)
    torch.testing.assert_close(advantages, torch.cat((earlier, later)), rtol=1e-12, atol=1e-12)

    earlier, _ = gae(r[:cut], v[:cut], boot[position], no_end[:cut], **kw)
    advantages, _ = gae(r, v, nv, no_end, end, boot, **kw)
    torch.testing.assert_close(advantages, torch.cat((earlier, later)), rtol=1e-12, atol=1e-12)


def test_terminated_wins_over_truncated_and_its_bootstrap_is_not_read():
    r, v, nv, term, trunc, boot, _ = rollout(30, 4, done=0.4)
    assert (term & trunc).any()
    boot = torch.where(trunc & ~term, boot, NAN)
    both = gae(r, v, nv, term, trunc, boot, gamma=0.99, gae_lambda=0.95)
    one = gae(r, v, nv, term, trunc & ~term, boot, gamma=0.99, gae_lambda=0.95)
    assert both[0].isfinite().all()
    torch.testing.assert_close(both, one, rtol=0, atol=0)


def test_skipping_a_row_gives_what_removing_it_gives():
    r, v, nv, term, trunc, boot, mask = rollout(50, 6, dtype=torch.float64, skipped=0.4)
    kw = {"gamma": 0.99, "gae_lambda": 0.95}
    advantages, returns = gae(r, v, nv, term, trunc, boot, mask, **kw)
    assert not advantages[~mask].any() and not returns[~mask].any()
    for n in range(6):
        kept = mask[:, n]
        rows = [x[kept, n, None] for x in (r, v, term, trunc, boot)]
        alone = gae(rows[0], rows[1], nv[n, None], *rows[2:], **kw)
        both = advantages[kept, n, None], returns[kept, n, None]
        torch.testing.assert_close(both, alone, rtol=1e-12, atol=1e-12)


def test_nothing_unread_leaks():
    r, v, nv, term, trunc, boot, mask = rollout(60, 5)
    kw = {"gamma": 0.99, "gae_lambda": 0.95}
    clean = gae(r, v, nv, term, trunc, boot, mask, **kw)
    for poison in (NAN, float("inf")):
        poisoned = gae(
            torch.where(mask, r, poison),
            torch.where(mask, v, poison),
            nv,
            term | ~mask,
            trunc,
            torch.where(mask & trunc & ~term, boot, poison),
            mask,
            **kw,
        )
        torch.testing.assert_close(poisoned, clean, rtol=0, atol=0)


def test_all_rows_skipped_gives_zeros():
    r, _, nv, term, trunc, _, mask = rollout(20, 3)
    nothing = torch.full_like(r, NAN)
    for next_value in (nv, torch.full_like(nv, NAN)):
        advantages, returns = gae(
            nothing, nothing, next_value, term, trunc, nothing, mask & False,
            gamma=0.99, gae_lambda=0.95,
        )  # fmt: skip
        assert not advantages.any() and not returns.any()


def test_an_autoreset_row_bootstraps_a_truncation_by_itself():
    # Gymnasium's NEXT_STEP: the observation of the row after the end is the final one.
    values = column(1.0, 2, 30, 4)
    end, autoreset = flag(1, length=4), flag(2, length=4)
    advantages, _ = gae(
        column(1.0, 1, NAN, 1), values, torch.tensor([5.0]), flag(length=4), end,
        values.roll(-1, 0), ~autoreset, gamma=0.5, gae_lambda=1.0,
    )  # fmt: skip
    # 1 + 30/2 - 2 = 14;  1 + 2/2 - 1 + 14/2 = 8;  1 + 5/2 - 4 = -0.5
    assert advantages[:, 0].tolist() == [8.0, 14.0, 0.0, -0.5]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("with_rest", [False, True])
def test_empty_input_gives_empty_output(shape, with_rest):
    r, v, nv, term, *rest = rollout(*shape)
    advantages, returns = gae(r, v, nv, term, *(rest if with_rest else ()), gamma=0.9, gae_lambda=1)
    assert advantages.shape == returns.shape == shape


def test_strides_do_not_matter():
    inputs = rollout(33, 6)
    kw = {"gamma": 0.99, "gae_lambda": 0.95}
    expected = gae(*inputs, **kw)
    layouts = (
        lambda x: x.t().contiguous().t(),
        lambda x: x.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3],
        lambda x: x.flip(0).clone().flip(0),
    )
    for layout in layouts:
        views = [layout(x) if x.ndim == 2 else x.repeat_interleave(2)[::2] for x in inputs]
        torch.testing.assert_close(gae(*views, **kw), expected, rtol=1e-6, atol=1e-6)
        mixed = [
            view if i % 2 else x for i, (view, x) in enumerate(zip(views, inputs, strict=True))
        ]
        torch.testing.assert_close(gae(*mixed, **kw), expected, rtol=1e-6, atol=1e-6)
    r, v, nv, term, *rest = inputs
    one = v[:1].expand(33, 6)
    torch.testing.assert_close(
        gae(r, one, nv, term, *rest, **kw), gae(r, one.clone(), nv, term, *rest, **kw)
    )


def test_inputs_stay_and_outputs_are_new():
    inputs = rollout(20, 4)
    copies = [x.clone() for x in inputs]
    advantages, returns = gae(*inputs, gamma=0.99, gae_lambda=0.95)
    advantages.fill_(7), returns.fill_(8)
    assert (advantages == 7).all()
    for x, copy in zip(inputs, copies, strict=True):
        assert torch.equal(x, copy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    low = [x.to(dtype) if x.is_floating_point() else x for x in rollout(50, 4)]
    single = [x.float() if x.is_floating_point() else x for x in low]
    actual = gae(*low, gamma=0.99, gae_lambda=0.95)
    assert actual[0].dtype == actual[1].dtype == torch.float32
    torch.testing.assert_close(actual, gae(*single, gamma=0.99, gae_lambda=0.95), rtol=0, atol=0)


def test_float32_is_as_exact_as_the_plain_loop():
    r, v, nv, term, *_ = rollout(2048, 4, done=0.002)
    exact, _ = gae(*(x.double() for x in (r, v, nv)), term, gamma=0.999, gae_lambda=0.99)
    loop, carry, following = torch.empty_like(r), torch.zeros(4), nv
    for t in reversed(range(2048)):
        carry = r[t] + 0.999 * following * ~term[t] - v[t] + 0.999 * 0.99 * ~term[t] * carry
        loop[t], following = carry, v[t]
    ours, _ = gae(r, v, nv, term, gamma=0.999, gae_lambda=0.99)
    assert (ours - exact).abs().max() <= 2 * (loop - exact).abs().max() + 1e-6


def test_wide_rows_take_the_loop_and_agree():
    r, v, nv, term, trunc, boot, mask = rollout(20, 4100)
    kw = {"gamma": 0.99, "gae_lambda": 0.95}
    wide = gae(r, v, nv, term, trunc, boot, mask, **kw)
    narrow = gae(*(x[..., 37:40] for x in (r, v, nv, term, trunc, boot, mask)), **kw)
    torch.testing.assert_close([x[:, 37:40] for x in wide], list(narrow), rtol=1e-5, atol=1e-6)


def test_hyper_parameters_may_be_tensors():
    inputs = rollout(30, 4)
    expected = gae(*inputs, gamma=0.99, gae_lambda=0.95)
    for dtype in (torch.float32, torch.float64):
        kw = {
            "gamma": torch.tensor(0.99, dtype=dtype),
            "gae_lambda": torch.tensor(0.95, dtype=dtype),
        }
        torch.testing.assert_close(gae(*inputs, **kw), expected, rtol=1e-6, atol=1e-6)


def test_lambda_may_differ_from_column_to_column():
    batch = rollout(20, 3, dtype=torch.float64)
    lambdas = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    advantages, returns = gae(*batch, gamma=0.9, gae_lambda=lambdas)
    for n, lam in enumerate(lambdas.tolist()):
        alone = [x[n : n + 1] if x.ndim == 1 else x[:, n : n + 1] for x in batch]
        expected = oracle(*alone, 0.9, lam)
        torch.testing.assert_close(advantages[:, n : n + 1], expected[0])
        torch.testing.assert_close(returns[:, n : n + 1], expected[1])


@pytest.mark.parametrize(("rho_clip", "c_clip"), [(0.8, 1.1), (1e9, 1e9), (torch.tensor(1.0), 0.3)])
def test_ratios_give_v_trace(rho_clip, c_clip):
    rewards, values, next_value, terminated, *_ = rollout(15, 4, dtype=torch.float64)
    ratios = torch.randn(15, 4, dtype=torch.float64).exp()
    batch = rewards, values, next_value, terminated
    options = {"ratios": ratios, "rho_clip": rho_clip, "c_clip": c_clip}
    advantages, returns = gae(*batch, gamma=0.9, gae_lambda=1.0, **options)
    following = torch.cat((values[1:], next_value[None]))
    for n in range(4):
        # v_s = V(s) + sum_t gamma^(t-s) (prod_{s <= i < t} c_i) rho_t delta_t, Espeholt et al., eq. 1.
        for start in range(15):
            v, weight = float(values[start, n]), 1.0
            for t in range(start, 15):
                live = 0.0 if terminated[t, n] else 0.9
                delta = float(rewards[t, n] + live * following[t, n] - values[t, n])
                v += weight * min(float(ratios[t, n]), float(rho_clip)) * delta
                weight *= live * min(float(ratios[t, n]), float(c_clip))
            assert float(returns[start, n]) == pytest.approx(v, rel=1e-9)
    torch.testing.assert_close(returns, advantages + values)


def test_ratios_of_one_change_nothing():
    batch = rollout(20, 3)
    plain = gae(*batch, gamma=0.9, gae_lambda=0.8)
    ones = gae(*batch, gamma=0.9, gae_lambda=0.8, ratios=torch.ones(20, 3))
    torch.testing.assert_close(ones, plain, rtol=0, atol=0)


def test_a_skipped_rows_ratio_is_not_read():
    *batch, mask = rollout(20, 3)
    ratios = torch.rand(20, 3)
    one = gae(*batch, mask, gamma=0.9, gae_lambda=0.8, ratios=ratios)
    other = gae(*batch, mask, gamma=0.9, gae_lambda=0.8, ratios=ratios.masked_fill(~mask, NAN))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("masked", [True, False])
def test_moments_are_those_of_the_unmasked_advantages(masked):
    *batch, mask = rollout(20, 3, dtype=torch.float64)
    mask = mask if masked else None
    advantages, returns, moments = gae(*batch, mask, gamma=0.9, gae_lambda=0.8, with_moments=True)
    plain = gae(*batch, mask, gamma=0.9, gae_lambda=0.8)
    torch.testing.assert_close((advantages, returns), plain, rtol=0, atol=0)
    kept = advantages[mask] if masked else advantages.flatten()
    expected = torch.stack(
        (torch.tensor(float(kept.numel())).double(), kept.mean(), kept.var() * (kept.numel() - 1))
    )
    torch.testing.assert_close(moments, expected)


def test_an_input_that_requires_grad_is_refused_unless_grad_mode_is_off():
    r, v, nv, term, *_ = rollout(5, 2)
    v.requires_grad_()
    with pytest.raises(ValueError, match=r"gae: values requires grad.*detach"):
        gae(r, v, nv, term, gamma=0.99, gae_lambda=0.95)
    with torch.no_grad():
        advantages, _ = gae(r, v, nv, term, gamma=0.99, gae_lambda=0.95)
    assert not advantages.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": torch.zeros(4)}, r"rewards is \[4\]; it must be \[T, N\]"),
        ({"rewards": torch.zeros(4, 2).long()}, r"rewards is torch.int64; it must be floating"),
        ({"values": torch.zeros(2, 4)}, r"values is \[2, 4\], rewards is \[4, 2\]"),
        ({"next_value": torch.zeros(1, 2)}, r"next_value is \[1, 2\]; it must be \[N\]"),
        ({"terminated": torch.zeros(4, 2)}, r"terminated is torch.float32; it must be bool"),
        ({"mask": torch.ones(4, 2).byte()}, r"mask is torch.uint8; it must be bool"),
        ({"mask": torch.ones(4, 1).bool()}, r"mask is \[4, 1\]"),
        ({"truncated": torch.zeros(4, 2).bool()}, r"truncated is given without bootstrap_values"),
        ({"bootstrap_values": torch.zeros(4, 2)}, r"bootstrap_values is given without truncated"),
        ({"gamma": 1.5}, r"gamma is 1.5; it must lie in \[0, 1\]"),
        ({"gae_lambda": torch.zeros(3)}, r"gae_lambda is a tensor of shape \[3\]"),
        ({"values": torch.zeros(4, 2, device="meta")}, r"values is on meta, rewards is on cpu"),
        ({"gamma": torch.tensor(0.9, requires_grad=True)}, r"gamma requires grad"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {
        "rewards": torch.zeros(4, 2),
        "values": torch.zeros(4, 2),
        "next_value": torch.zeros(2),
        "terminated": torch.zeros(4, 2).bool(),
        "gamma": 0.99,
        "gae_lambda": 0.95,
    }
    with pytest.raises(ValueError, match="gae: " + message):
        gae(**{**good, **change})


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph(backend):
    inputs = rollout(21, 3)
    r, v, nv, term, trunc, boot, mask = inputs

    @torch.compile(backend=backend, fullgraph=True)
    def step(*tensors):
        return gae(*tensors, gamma=0.99, gae_lambda=0.95)

    for tensors in ((r, v, nv, term), inputs):
        expected = gae(*tensors, gamma=0.99, gae_lambda=0.95)
        torch.testing.assert_close(step(*tensors), expected)

    cu_seqlens = torch.tensor([0, 21])

    @torch.compile(backend=backend, fullgraph=True)
    def packed(*tensors):
        return gae_packed(*tensors, gamma=torch.tensor(0.99), gae_lambda=0.95)

    tokens = r[:, 0], v[:, 0], nv[:1], term[:, 0], cu_seqlens, trunc[:, 0], boot[:, 0], mask[:, 0]
    expected = gae(*(x[..., :1] for x in inputs), gamma=0.99, gae_lambda=0.95)
    torch.testing.assert_close(packed(*tokens), tuple(x[:, 0] for x in expected))


# Packed sequences.

LENGTHS = (0, 5, 1, 0, 0, 17, 8, 3, 0)


def pack(lengths, *, seed=0, dtype=torch.float64):
    """The arguments of gae_packed, `cu_seqlens` fifth."""
    r, v, _, term, trunc, boot, mask = rollout(sum(lengths), 1, seed=seed, dtype=dtype)
    next_value = torch.randn(len(lengths), dtype=dtype)
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0)
    rows = [x[:, 0] for x in (r, v, term, trunc, boot, mask)]
    return rows[0], rows[1], next_value, rows[2], cu_seqlens, *rows[3:]


def pad(tokens, lengths, fill):
    """[total] -> [T, num_seqs]."""
    parts = tokens.split(lengths)
    padded = torch.full((max(lengths), len(lengths)), fill, dtype=tokens.dtype)
    for i, part in enumerate(parts):
        padded[: len(part), i] = part
    return padded


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("given", [4, 6, 7])
def test_packed_equals_padded_and_masked(index_dtype, given):
    r, v, nv, term, cu, *rest = pack(LENGTHS)
    mask = rest[2] if given == 7 else torch.ones_like(term)
    rest = rest[: given - 4]
    kw = {"gamma": 0.99, "gae_lambda": 0.95}
    packed = gae_packed(r, v, nv, term, cu.to(index_dtype), *rest, **kw)
    padded = gae(
        pad(r, LENGTHS, NAN),
        pad(v, LENGTHS, NAN),
        nv,
        pad(term, LENGTHS, True),
        *(pad(x, LENGTHS, fill) for x, fill in zip(rest[:2], (True, NAN), strict=False)),
        mask=pad(mask, LENGTHS, False),
        **kw,
    )
    real = pad(torch.ones_like(term), LENGTHS, False).t()
    for tokens, columns in zip(packed, padded, strict=True):
        assert not columns.t()[~real].any()
        torch.testing.assert_close(tokens, columns.t()[real], rtol=1e-12, atol=1e-12)


def test_packed_matches_the_definition_on_each_sequence():
    r, v, nv, term, cu, trunc, boot, mask = pack(LENGTHS, seed=3)
    advantages, returns = gae_packed(
        r, v, nv, term, cu, trunc, boot, mask, gamma=0.97, gae_lambda=0.9
    )
    for i, (start, end) in enumerate(itertools.pairwise(cu)):
        rows = [x[start:end, None] for x in (r, v, term, trunc, boot, mask)]
        expected = oracle(rows[0], rows[1], nv[i, None], *rows[2:], 0.97, 0.9)
        actual = advantages[start:end, None], returns[start:end, None]
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_no_sequence_sees_another():
    r, v, nv, term, cu, *_ = pack(LENGTHS)
    kw = {"gamma": 1.0, "gae_lambda": 1.0}
    before, _ = gae_packed(r, v, nv, term & False, cu, **kw)
    sequence = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    for i in range(len(LENGTHS)):
        mine = sequence == i
        changed = torch.where(torch.arange(len(LENGTHS)) == i, nv + 100, nv)
        after, _ = gae_packed(
            torch.where(mine, r + 100, r), torch.where(mine, v - 100, v), changed, term & False, cu,
            **kw,
        )  # fmt: skip
        assert torch.equal(after[~mine], before[~mine])
        assert (after[mine] != before[mine]).all()


def test_packed_never_reads_skipped_tokens():
    r, v, nv, term, cu, trunc, boot, mask = pack(LENGTHS)
    kw = {"gamma": 0.99, "gae_lambda": 0.95}
    clean = gae_packed(r, v, nv, term, cu, trunc, boot, mask, **kw)
    poisoned = gae_packed(
        torch.where(mask, r, NAN), torch.where(mask, v, NAN), nv, term | ~mask, cu, trunc | ~mask,
        torch.where(mask & trunc & ~term, boot, NAN), mask, **kw,
    )  # fmt: skip
    torch.testing.assert_close(poisoned, clean, rtol=0, atol=0)
    assert not clean[0][~mask].any() and not clean[1][~mask].any()


def test_packed_options_equal_those_of_each_sequence_alone():
    lengths = (3, 0, 7, 1)
    r, v, nv, term, cu, trunc, boot, mask = pack(lengths)
    lambdas, ratios = torch.rand(4).double(), torch.rand(11).double() * 2
    options = {"gamma": 0.9, "rho_clip": 0.9, "c_clip": 1.1}
    advantages, returns, moments = gae_packed(
        *(r, v, nv, term, cu, trunc, boot, mask),
        **(options | {"gae_lambda": lambdas, "ratios": ratios, "with_moments": True}),
    )
    for i, length in enumerate(lengths):
        own = slice(int(cu[i]), int(cu[i]) + length)
        rows = [x[own, None] for x in (term, trunc, boot, mask)]
        alone = gae(
            *(r[own, None], v[own, None], nv[i, None], *rows),
            **(options | {"gae_lambda": float(lambdas[i]), "ratios": ratios[own, None]}),
        )
        torch.testing.assert_close(advantages[own], alone[0][:, 0])
        torch.testing.assert_close(returns[own], alone[1][:, 0])
    kept = advantages[mask]
    torch.testing.assert_close(moments[1], kept.mean())
    torch.testing.assert_close(moments[2], (kept - kept.mean()).square().sum())


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_packed_without_tokens_is_empty(lengths):
    empty, no_flag = torch.empty(0), torch.empty(0, dtype=torch.bool)
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    advantages, returns = gae_packed(
        empty, empty, torch.zeros(len(lengths)), no_flag, cu_seqlens, gamma=0.99, gae_lambda=0.95
    )
    assert advantages.shape == returns.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 2, 5])}, r"runs from 0 to 5.*number of tokens, 4"),
        ({"cu_seqlens": torch.tensor([1, 2, 4])}, r"runs from 1 to 4"),
        ({"cu_seqlens": torch.tensor([0, 5, 4])}, r"descends"),
        ({"cu_seqlens": torch.tensor([0.0, 2, 4])}, r"cu_seqlens is torch.float32 \[3\]"),
        ({"cu_seqlens": torch.tensor([0, 4])}, r"next_value is \[2\]; .* here \[1\]"),
        ({"cu_seqlens": torch.tensor([]).long()}, r"must hold at least the leading 0"),
        ({"rewards": torch.zeros(4, 1)}, r"rewards is \[4, 1\]; .*use gae for \[T, N\]"),
        ({"values": torch.zeros(3)}, r"values is \[3\], rewards is \[4\]; both must be \[total\]"),
        ({"mask": torch.ones(4)}, r"mask is torch.float32; it must be bool"),
    ],
)
def test_bad_packed_input_is_named(change, message):
    good = {
        "rewards": torch.zeros(4),
        "values": torch.zeros(4),
        "next_value": torch.zeros(2),
        "terminated": torch.zeros(4).bool(),
        "cu_seqlens": torch.tensor([0, 2, 4]),
        "gamma": 0.99,
        "gae_lambda": 0.95,
    }
    with pytest.raises(ValueError, match="gae_packed: .*" + message):
        gae_packed(**{**good, **change})


# Other libraries' conventions.


def test_agrees_with_flags_that_mark_the_start_of_an_episode():
    """Stable-Baselines3 and CleanRL store the done *entering* a row, the last one apart."""
    r, v, nv, term, *_ = rollout(40, 3, dtype=torch.float64)
    starts = torch.cat((torch.zeros(1, 3, dtype=torch.bool), term[:-1]))
    last_done = term[-1]
    expected, carry = torch.empty_like(r), torch.zeros(3, dtype=torch.float64)
    for t in reversed(range(40)):
        done, following = (last_done, nv) if t == 39 else (starts[t + 1], v[t + 1])
        goes_on = 1 - done.double()
        delta = r[t] + 0.99 * following * goes_on - v[t]
        carry = expected[t] = delta + 0.99 * 0.95 * goes_on * carry
    actual, _ = gae(r, v, nv, term, gamma=0.99, gae_lambda=0.95)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_agrees_with_truncation_folded_into_the_reward():
    """Stable-Baselines3 adds gamma V(final observation) to the reward of a truncated row."""
    r, v, nv, term, trunc, boot, _ = rollout(40, 3, dtype=torch.float64)
    cut = trunc & ~term
    folded = gae(r + 0.99 * boot * cut, v, nv, term | cut, gamma=0.99, gae_lambda=0.95)
    actual = gae(r, v, nv, term, trunc, boot, gamma=0.99, gae_lambda=0.95)
    torch.testing.assert_close(actual, folded, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("position", [0, 1, 17, 38, 39])
def test_agrees_with_stable_baselines3(position):
    buffers = pytest.importorskip("stable_baselines3.common.buffers")
    spaces = pytest.importorskip("gymnasium.spaces")
    T, N = 40, 3
    r, v, nv, _, _, boot, _ = rollout(T, N)
    end = torch.zeros(T, N, dtype=torch.bool)
    end[position, 1] = True
    buffer = buffers.RolloutBuffer(
        T, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), device="cpu", gamma=0.99, gae_lambda=0.95,
        n_envs=N,
    )  # fmt: skip
    starts = torch.cat((torch.zeros(1, N), end[:-1].float()))
    for folded, ours in ((r, (end,)), (r + 0.99 * boot * end, (end & False, end, boot))):
        buffer.rewards[:], buffer.values[:] = folded.numpy(), v.numpy()
        buffer.episode_starts[:] = starts.numpy()
        buffer.compute_returns_and_advantage(nv, end[-1].numpy())
        theirs = torch.from_numpy(buffer.advantages), torch.from_numpy(buffer.returns)
        actual = gae(r, v, nv, *ours, gamma=0.99, gae_lambda=0.95)
        torch.testing.assert_close(actual, theirs, rtol=1e-5, atol=1e-5)


def test_agrees_with_torchrl():
    functional = pytest.importorskip("torchrl.objectives.value.functional")
    r, v, nv, term, trunc, boot, _ = rollout(40, 3, dtype=torch.float64)
    following = torch.where(trunc, boot, torch.cat((v[1:], nv[None])))
    ours = gae(r, v, nv, term, trunc, boot, gamma=0.99, gae_lambda=0.95)
    batched = [x.t().unsqueeze(-1).contiguous() for x in (v, following, r, term | trunc, term)]
    for theirs in (
        functional.generalized_advantage_estimate,
        functional.vec_generalized_advantage_estimate,
    ):
        result = theirs(0.99, 0.95, *batched)
        # The vectorised one drops terms below 1e-7.
        torch.testing.assert_close(
            tuple(x.squeeze(-1).t() for x in result), ours, rtol=1e-5, atol=1e-5
        )
