"""The minibatches of an MLP actor-critic on a CPU, where the number of operations is the cost.

A minibatch of a few hundred rows spends its time not in arithmetic but in getting from one small
operation to the next, a large one in memory traffic. So this computes gradients and nothing else:
rows are shuffled and advantages whitened once an epoch, actor and critic go through one batched
product a layer, large minibatches in blocks that stay in cache, and the statistics are made of stored
log-probs and values after the last minibatch, all at once. The formulas are those of
`actor_critic_loss_and_grads`, which is its oracle (tests/test_cpu_minibatches.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast.functional._gaussian import HALF_LOG_2PI
from ppo_fast.functional._surrogate import LOG_RATIO_LIMIT, Summands, surrogate
from ppo_fast.functional._terms import ADVANTAGE_EPS, Rows, Terms
from ppo_fast.results import ActorCriticSpec
from ppo_fast.rollout import Batch

BLOCK_ELEMENTS = 1 << 17
"""Rows times the widest layer, at a time: of 2^15 to 2^18 the quickest here."""

STATS_ROWS = 1 << 15
"""Rows whose statistics are made at once."""

aten = torch.ops.aten


def why_not_here(spec: ActorCriticSpec, batch: Batch, rows: int, options: dict[str, Any]) -> str:
    """Say why minibatches of `rows` rows take the op itself; empty if they need not."""
    if rows < 2:
        return f"minibatches have {rows} rows"
    if spec.shared_sizes or spec.actor_sizes != spec.critic_sizes or not spec.actor_sizes:
        return "actor and critic differ in their hidden layers"
    if spec.squash:
        return "actions are squashed"
    if spec.activation == "silu":
        return "the derivative of silu does not follow from its output"
    if not (batch.mask is None and batch.weights is None and batch.action_mask is None):
        return "rows are masked or weighted"
    if options.get("dual_clip") is not None or options.get("old_kl_coef"):
        return "the loss has more terms"
    if options.get("vf_clip", "max") != "max":
        return "the value loss is clipped otherwise"
    return ""


class Columns(NamedTuple):
    """One number a row; [m] of a minibatch, or of all minibatches in the order of the update."""

    old_log_probs: Tensor
    old_values: Tensor
    returns: Tensor
    neg_advantages: Tensor
    """divided by m: a sum over the minibatch is a mean"""
    log_probs: Tensor
    values: Tensor
    neg_entropy: Tensor


LOG_PROBS, VALUES = Columns._fields.index("log_probs"), Columns._fields.index("values")


class Block(NamedTuple):
    """Views of what belongs to some rows of a minibatch."""

    obs: Tensor
    """[2, m, D], the same for actor and critic"""
    actions: list[Tensor]
    """[1, m] int64 for each categorical head; or one [A, m]"""
    columns: Columns
    values: Tensor
    """[1, m], those of the columns"""
    log_probs: Tensor
    """[1, m], likewise"""
    memory: Memory
    total: int
    """rows of the whole minibatch"""


class Layer(NamedTuple):
    """A layer of actor and critic at once; views of the flat parameters and gradients."""

    weight: Tensor
    """[2, out, in]"""
    transposed: Tensor
    bias: Tensor
    """[2, 1, out]"""
    grad_weight: Tensor
    grad_bias: Tensor
    """[2, out]"""


class Last(NamedTuple):
    """The last layer of one of them."""

    weight: Tensor
    """[out, in]"""
    bias: Tensor
    """[out, 1]"""
    grad_weight: Tensor
    grad_bias: Tensor


class Memory(NamedTuple):
    """Buffers for minibatches of one size."""

    hidden: list[Tensor]
    """[2, m, width] of every layer"""
    gradients: list[Tensor]
    """by those"""
    gradients_t: list[Tensor]
    features: list[Tensor]
    """[m, width] of the last one; the actor's and the critic's"""
    features_t: list[Tensor]
    grad_features: list[Tensor]
    outputs: Tensor
    """[A, m]"""
    grad_outputs: Tensor
    heads: list[Tensor]
    """the outputs by categorical head"""
    grad_heads: list[Tensor]
    grad_values: Tensor
    """[1, m]"""
    grad_last: list[tuple[Tensor, Tensor]]
    """`grad_outputs` and `grad_values`, each with its transpose"""
    vectors: list[Tensor]
    """[m], scratch"""
    pull: Tensor
    """[1, m], the first of them"""

    @classmethod
    def empty(cls, rows: int, spec: ActorCriticSpec) -> Memory:
        """New buffers."""
        hidden = [torch.empty(2, rows, width) for width in spec.actor_sizes]
        gradients = [torch.empty_like(h) for h in hidden]
        outputs, grad_outputs = torch.empty(2, spec.num_outputs, rows)
        sizes = spec.head_sizes or (spec.num_outputs,)
        grad_values, vectors = torch.empty(1, rows), torch.empty(4, rows)
        return cls(
            hidden,
            gradients,
            [g.transpose(1, 2) for g in gradients],
            list(hidden[-1].unbind()),
            [h.t() for h in hidden[-1]],
            list(gradients[-1].unbind()),
            outputs,
            grad_outputs,
            list(outputs.split(sizes)),
            list(grad_outputs.split(sizes)),
            grad_values,
            [(gradient, gradient.t()) for gradient in (grad_outputs, grad_values)],
            list(vectors.unbind()),
            vectors[:1],
        )


class CPUMinibatches:
    """Gradients of the minibatches of one update; see `ppo_fast.update.Minibatches`.

    Args:
        parameters, gradients, spec: as in `actor_critic_loss_and_grads`; float32 on a CPU.
    """

    def __init__(self, parameters: Tensor, gradients: Tensor, spec: ActorCriticSpec) -> None:
        self.spec = spec
        gaussian = spec.head_sizes is None
        start = spec.num_outputs if gaussian else 0
        self.log_std = parameters[:start].unsqueeze(1) if gaussian else None
        self.grad_log_std = gradients[:start]
        actor, critic = spec.layers[1:]
        gap = sum(out * (width + 1) for out, width in actor)
        self.layers: list[Layer] = []
        for out, width in actor[:-1]:
            weight, grad_weight = (
                flat.as_strided((2, out, width), (gap, width, 1), start)
                for flat in (parameters, gradients)
            )
            start += out * width
            bias, grad_bias = (
                flat.as_strided((2, out), (gap, 1), start) for flat in (parameters, gradients)
            )
            start += out
            transposed = weight.transpose(1, 2)
            self.layers.append(Layer(weight, transposed, bias.unsqueeze(1), grad_weight, grad_bias))
        self.last = []
        for (out, width), first in ((actor[-1], start), (critic[-1], start + gap)):
            middle, end = first + out * width, first + out * (width + 1)
            weight, grad_weight = (
                flat[first:middle].view(out, width) for flat in (parameters, gradients)
            )
            bias, grad_bias = (flat[middle:end] for flat in (parameters, gradients))
            self.last.append(Last(weight, bias.unsqueeze(1), grad_weight, grad_bias))
        self._layout: tuple[int, int, int] | None = None

    def prepare(
        self, batch: Batch, obs: Tensor, options: dict[str, Any], epochs: int, k: int
    ) -> None:
        """Make ready for `epochs` epochs of `k` minibatches.

        Args:
            batch: M samples; `obs` [M, D] are its features.
            options: keyword arguments of `actor_critic_loss_and_grads`, numbers for coefficients.
        """
        number = len(batch)
        self.batch, self.obs, self.options = batch, obs, options
        self.old = torch.stack((batch.log_probs, batch.values, batch.returns, batch.advantages))
        self.actions = batch.actions if batch.actions.ndim > 1 else batch.actions.unsqueeze(1)
        self.done = 0
        if self._layout != (number, epochs, k):
            self._layout = (number, epochs, k)
            self._lay_out(number, epochs, k)
        clip, high = float(options["clip_coef"]), options.get("clip_coef_high")
        self.low, self.high = 1.0 - clip, 1.0 + float(clip if high is None else high)
        limit = options.get("vf_clip_coef")
        self.vf_clip = float("inf") if limit is None else float(limit)
        vf_coef, self.ent_coef = float(options.get("vf_coef", 0.5)), float(options["ent_coef"])
        self.vf_scale = {size: torch.tensor(vf_coef / size) for size in set(self.sizes)}
        self.ent_scale = {size: torch.tensor(self.ent_coef / size) for size in set(self.sizes)}

    def _lay_out(self, number: int, epochs: int, k: int) -> None:
        """Allocate for a number of rows, and cut the memory up, once for all epochs and updates."""
        spec, gaussian = self.spec, self.spec.head_sizes is None
        self.whole = torch.empty(len(Columns._fields), epochs * number)
        self.shuffled_obs = torch.empty(number, spec.obs_size)
        heads = spec.num_outputs if gaussian else len(spec.head_sizes or ())
        dtype = torch.float32 if gaussian else torch.int64
        self.shuffled_actions = torch.empty(heads, number, dtype=dtype)
        self.sizes = [number // k + (part < number % k) for part in range(k)]
        self.epoch_old = list(self.whole[:4].split(number, 1))
        self.minibatches: list[list[Block]] = []
        self.neg_advantages = list(self.whole[3].split(self.sizes * epochs))
        memories: dict[int, Memory] = {}
        step = max(1, BLOCK_ELEMENTS // max(spec.actor_sizes))
        for epoch in range(epochs):
            start = 0
            for size in self.sizes:
                blocks = []
                for first in range(start, start + size, step):
                    end = min(first + step, start + size)
                    rows = end - first
                    if rows not in memories:
                        memories[rows] = Memory.empty(rows, spec)
                    actions = self.shuffled_actions[:, first:end]
                    own = self.whole[:, epoch * number + first : epoch * number + end]
                    blocks.append(
                        Block(
                            self.shuffled_obs[first:end].expand(2, rows, spec.obs_size),
                            [actions] if gaussian else list(actions.split(1)),
                            Columns(*own.unbind()),
                            own[VALUES : VALUES + 1],
                            own[LOG_PROBS : LOG_PROBS + 1],
                            memories[rows],
                            size,
                        )
                    )
                self.minibatches.append(blocks)
                start += size

    @torch.no_grad()
    def begin(self, epoch: int, order: Tensor) -> None:
        """Shuffle the rows by `order` [M] and whiten the advantages of every minibatch."""
        torch.index_select(self.obs, 0, order, out=self.shuffled_obs)
        self.shuffled_actions.copy_(self.actions.index_select(0, order).t())
        torch.index_select(self.old, 1, order, out=self.epoch_old[epoch])
        k = len(self.sizes)
        for advantages in self.neg_advantages[epoch * k : (epoch + 1) * k]:
            size = advantages.numel()
            scale = -1.0 / size
            if self.options["norm_adv"]:
                # Centred first, so that equal advantages come out as 0 and not as (one ulp) / eps.
                advantages.sub_(advantages.mean())
                std, rest = torch.std_mean(advantages)
                advantages.sub_(rest)
                scale /= float(std) + ADVANTAGE_EPS
            advantages.mul_(scale)

    @torch.no_grad()
    def run(self, number: int) -> None:
        """Write the gradients of the minibatch `number`, counted over the epochs."""
        for place, block in enumerate(self.minibatches[number]):
            self._run(block, accumulate=place > 0)
        self.done = number + 1

    def _run(self, block: Block, accumulate: bool) -> None:
        memory, activation = block.memory, self.spec.activation
        below = block.obs
        for layer, hidden in zip(self.layers, memory.hidden, strict=True):
            torch.baddbmm(layer.bias, below, layer.transposed, out=hidden)
            if activation == "tanh":
                hidden.tanh_()
            elif activation == "relu":
                hidden.relu_()
            else:
                aten.elu_(hidden)
            below = hidden
        actor, critic = self.last
        torch.addmm(actor.bias, actor.weight, memory.features_t[0], out=memory.outputs)
        torch.addmm(critic.bias, critic.weight, memory.features_t[1], out=block.values)
        if self.log_std is None:
            self._categorical(block)
        else:
            self._gaussian(block, accumulate)
        self._values(block)
        for net, (gradient, gradient_t) in enumerate(memory.grad_last):
            last = self.last[net]
            if accumulate:
                last.grad_weight.addmm_(gradient, memory.features[net])
                last.grad_bias.add_(gradient.sum(1))
            else:
                torch.mm(gradient, memory.features[net], out=last.grad_weight)
                torch.sum(gradient, 1, out=last.grad_bias)
            torch.mm(gradient_t, last.weight, out=memory.grad_features[net])
        for depth in range(len(self.layers) - 1, -1, -1):
            layer = self.layers[depth]
            hidden, gradient = memory.hidden[depth], memory.gradients[depth]
            if activation == "tanh":
                aten.tanh_backward.grad_input(gradient, hidden, grad_input=gradient)
            elif activation == "relu":
                aten.threshold_backward.grad_input(gradient, hidden, 0, grad_input=gradient)
            else:
                aten.elu_backward.grad_input(
                    gradient, 1.0, 1.0, 1.0, True, hidden, grad_input=gradient
                )
            below = memory.hidden[depth - 1] if depth else block.obs
            if accumulate:
                layer.grad_weight.baddbmm_(memory.gradients_t[depth], below)
                layer.grad_bias.add_(gradient.sum(1))
            else:
                torch.bmm(memory.gradients_t[depth], below, out=layer.grad_weight)
                torch.sum(gradient, 1, out=layer.grad_bias)
            if depth:
                torch.bmm(gradient, layer.weight, out=memory.gradients[depth - 1])

    def _pull(self, columns: Columns, memory: Memory) -> Tensor:
        """The gradient [m] by the log-probs: of max(-A r, -A clamp(r)), where the clip is not it."""
        ratio, clipped, active, unlimited = memory.vectors
        torch.sub(columns.log_probs, columns.old_log_probs, out=unlimited)
        torch.clamp(unlimited, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT, out=ratio)
        within = unlimited.eq_(ratio)
        ratio.exp_()
        torch.clamp(ratio, self.low, self.high, out=clipped)
        pull = ratio.mul_(columns.neg_advantages)
        clipped.mul_(columns.neg_advantages)
        torch.le(clipped, pull, out=active)
        return pull.mul_(active).mul_(within)

    def _categorical(self, block: Block) -> None:
        """Store log-probs and entropies, and the gradient by the logits.

        d_j = g (1[j = action] - p_j) + c p_j (log p_j + H), with g of `_pull`, c the entropy's
        coefficient and H the head's entropy.
        """
        columns, memory = block.columns, block.memory
        pairs = list(zip(memory.heads, memory.grad_heads, block.actions, strict=True))
        neg_entropies = []
        for number, (logits, probs, action) in enumerate(pairs):
            log_probs = torch._log_softmax(logits, 0, False, out=logits)
            torch.exp(log_probs, out=probs)
            products = log_probs * probs
            if len(pairs) == 1:
                neg_entropies.append(torch.sum(products, 0, out=columns.neg_entropy))
                torch.gather(log_probs, 0, action, out=block.log_probs)
                break
            if number == 0:
                columns.neg_entropy.zero_()
                columns.log_probs.zero_()
            neg_entropies.append(products.sum(0))
            columns.neg_entropy.add_(neg_entropies[-1])
            block.log_probs.add_(log_probs.gather(0, action))
        pull = self._pull(columns, memory)
        ent_scale = self.ent_scale[block.total]
        for (log_probs, probs, action), neg_entropy in zip(pairs, neg_entropies, strict=True):
            if self.ent_coef:
                log_probs.sub_(neg_entropy).mul_(ent_scale).sub_(pull)
                probs.mul_(log_probs)
            else:
                probs.mul_(pull).neg_()
            probs.scatter_add_(0, action, memory.pull)

    def _gaussian(self, block: Block, accumulate: bool) -> None:
        """The same for the means, and the gradient by log_std."""
        assert self.log_std is not None
        columns, memory, size = block.columns, block.memory, self.spec.num_outputs
        inv_std = self.log_std.neg().exp_()
        z = torch.sub(block.actions[0], memory.outputs, out=memory.grad_outputs).mul_(inv_std)
        squares = torch.mul(z, z, out=memory.outputs)
        constant = float(self.log_std.sum()) + size * HALF_LOG_2PI
        torch.sum(squares, 0, out=columns.log_probs)
        columns.log_probs.mul_(-0.5).sub_(constant)
        columns.neg_entropy.fill_(-constant - 0.5 * size)
        pull = self._pull(columns, memory)
        if accumulate:
            self.grad_log_std.addmv_(squares.sub_(1.0), pull)
        else:
            torch.mv(squares.sub_(1.0), pull, out=self.grad_log_std)
            if self.ent_coef:
                self.grad_log_std.sub_(self.ent_coef)
        z.mul_(inv_std).mul_(pull)

    def _values(self, block: Block) -> None:
        """The gradient of half the larger of both squared errors, clipped and not."""
        columns, memory = block.columns, block.memory
        error = torch.sub(columns.values, columns.returns, out=memory.grad_values[0])
        if self.vf_clip < float("inf"):
            size, moved, clipped = memory.vectors[:3]
            torch.sub(columns.values, columns.old_values, out=moved)
            # The excess over the clip range is exactly 0 inside it; see `_surrogate._value_terms`.
            aten.softshrink.out(moved, self.vf_clip, out=clipped)
            torch.sub(error, clipped, out=clipped)
            torch.abs(error, out=size)
            error.mul_(size.ge_(clipped.abs_()))
        error.mul_(self.vf_scale[block.total])

    @torch.no_grad()
    def approx_kl(self) -> Tensor:
        """Of the minibatch run last, 0-d."""
        blocks = [block.columns for block in self.minibatches[self.done - 1]]
        log_ratio = torch.cat([c.log_probs - c.old_log_probs for c in blocks])
        log_ratio.clamp_(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        return (log_ratio.expm1() - log_ratio).mean()

    def square_sums(self) -> None:
        """Not known."""

    @torch.no_grad()
    def stats(self) -> Tensor:
        """[S, len(PPO_STATS)] of the S minibatches run so far."""
        k = len(self.sizes)
        sizes = (self.sizes * (self.done // k + 1))[: self.done]
        group = max(1, STATS_ROWS // max(self.sizes))
        found, start = [], 0
        for first in range(0, self.done, group):
            own = sizes[first : first + group]
            found.append(self._stats(self.whole[:, start : start + sum(own)], own))
            start += sum(own)
        return torch.cat(found)

    def _stats(self, whole: Tensor, sizes: list[int]) -> Tensor:
        c = Columns(*whole.unbind())
        rows = Rows(
            c.old_log_probs, c.neg_advantages, c.values, c.old_values, c.returns, *[None] * 4
        )
        t = Terms(
            c.old_log_probs,
            c.neg_advantages,
            1.0 - self.low,
            self.high - 1.0,
            values=c.values,
            vf_clip_coef=self.vf_clip,
            ent_coef=self.ent_coef,
        )
        summands = Summands.empty(c.values)
        surrogate(c.log_probs, c.neg_entropy.neg(), rows, t, summands)
        log_ratio = c.log_probs - c.old_log_probs
        deviation = log_ratio.clamp_(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).expm1_().abs_()
        counts = torch.tensor(sizes, dtype=torch.float32)
        sums = torch.stack([part.sum(1) for part in summands.whole.split(sizes, 1)])
        sums[:, 1:] /= counts.unsqueeze(1)  # the advantages of the first are divided already
        deviations = torch.stack([part.amax() for part in deviation.split(sizes)])
        return torch.cat((sums, deviations.unsqueeze(1), counts.unsqueeze(1)), 1)
