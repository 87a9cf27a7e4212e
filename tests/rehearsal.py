"""A stand-in for CUDA graphs on a CPU: records the operations of a phase and replays them.

What a graph forbids is forbidden here: reading a tensor's value, shapes that depend on data, and
tensors made of Python data. As in a graph, a replay runs the recorded operations on the recorded
memory, and no Python: what was a number while recording stays that number.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

FORBIDDEN = {
    aten._local_scalar_dense: "a tensor is read as a Python number",
    aten.is_nonzero: "a tensor is read as a Python bool",
    aten.equal: "tensors are compared by the host",
    aten.nonzero: "a shape depends on data",
    aten.masked_select: "a shape depends on data",
    aten._unique2: "a shape depends on data",
    aten.lift_fresh: "a tensor is made of Python data",
}


class NotCapturable(RuntimeError):
    """The phase did what a CUDA graph cannot hold."""


def allocates(record):
    """Whether an operation returned memory that was in none of its arguments."""
    _, args, kwargs, outputs = record
    given = {storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
    return any(isinstance(x, torch.Tensor) and storage(x) not in given for x in outputs)


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


class Recorder(TorchDispatchMode):
    """Records what runs under it.

    `phases` lists the number of operations of every recording, `allocations` how many of them
    returned memory that none of their arguments lies in.
    """

    def __init__(self):
        super().__init__()
        self.phases = []
        self.allocations = []
        self.replays = 0

    def __call__(self, function, generators):
        self.tape = tape = []
        before = [generator.get_state() for generator in generators]
        try:
            with self:
                result = function()
        except Exception:
            # Recording a CUDA graph draws nothing.
            for generator, state in zip(generators, before, strict=True):
                generator.set_state(state)
            raise
        self.phases.append(len(tape))
        self.allocations.append(sum(map(allocates, tape)))

        @torch.no_grad()
        def replay():
            self.replays += 1
            for operation, args, kwargs, outputs in tape:
                fresh = tree_leaves(operation(*args, **kwargs))
                for old, new in zip(outputs, fresh, strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        return replay, result

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        why = FORBIDDEN.get(operation.overloadpacket)
        if operation.overloadpacket is aten.index and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        ):
            why = "a shape depends on data"
        if why is not None:
            raise NotCapturable(f"{operation}: {why}")
        result = operation(*args, **kwargs)
        self.tape.append((operation, args, kwargs, tree_leaves(result)))
        return result
