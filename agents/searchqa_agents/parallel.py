"""One process or several: what the trainer asks of the processes beside it.

Every process holds the whole batch as numbers and computes the same advantages from it. It plays its own share of the questions, and evaluates
its own share of a minibatch's trajectories with the whole minibatch's totals, so that gradients are *sums* over the processes and equal those of
one process. Two forms, under ``torchrun``:

- ``ddp``: each process holds the whole model; gradients are summed by ``DistributedDataParallel``.
- ``fsdp2``: weights, gradients and optimiser are sharded over the processes by ``fully_shard``, layer by layer. Processes decode different numbers of
  tokens, while a sharded forward pass needs all of them at once. Therefore the policy that plays is a plain copy whose weights are gathered before
  each rollout and given back before each update: one whole model in its own dtype on each device, while nothing else is held there but shards.
  (The other way, equal decode steps on all processes through sharded weights, keeps no copy, but gathers every layer again for every token and waits
  at each token for the process with the longest segment.)

``ddp`` sums gradients once per update, in its last micro-batch; ``fsdp2`` in every one, so that between them it holds its shard of the gradient and
not the whole: of a model that needs shards, the whole would not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from gymnasium.vector import VectorEnv
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from searchqa_agents.language_model import LanguageModel
from searchqa_agents.launch import launched, place
from searchqa_agents.rollout import rollout
from searchqa_agents.trajectory import Trajectory
from searchqa_envs.errors import ConfigurationError, SearchQAError

Kind = Literal["auto", "ddp", "fsdp2"]
TIMEOUT = timedelta(minutes=30)
"""How long one reduction of gradients or gathering of weights may take: all processes begin it at about the same time."""
PATIENCE = timedelta(days=2)
"""How long processes wait for each other in between, while one plays longer episodes, evaluates, or writes a checkpoint. One that ends is noticed at once."""

T = TypeVar("T")


class ParallelError(SearchQAError):
    """Another process is gone, or does not answer."""


class Parallel:
    """A run in this process alone; :class:`ProcessGroup` is the form for several."""

    rank = 0
    world_size = 1
    sharded = False
    """whether :meth:`wrap` shards: what it returns is then another module than it was given, and :meth:`gather_weights` is needed"""

    @property
    def main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of a list that all of them hold: every ``world_size``-th item."""
        return list(items)[self.rank :: self.world_size]

    def gather(self, items: Sequence[T]) -> list[T]:
        """The whole list from the parts that :meth:`share` would give; the same in every process."""
        return list(items)

    def broadcast(self, value: T) -> T:
        """The value that process 0 has."""
        return value

    def summed(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over the processes by name; a process may lack a name."""
        return dict(values)

    def micro_batches(self, lengths: Sequence[int], batched: Callable[[list[int]], list[list[int]]]) -> list[list[int]]:
        """This process's micro-batches of a minibatch: indices into ``lengths``.

        ``batched`` makes micro-batches of the indices that it is given. Every process gets equally many: where others have more, an empty one,
        which must be evaluated too, because the others wait for it.
        """
        return batched(list(range(len(lengths))))

    def broadcast_weights(self, module: nn.Module) -> None:
        """Give a module the weights that it has in process 0. All processes together."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """What to call instead of ``module``, which must be the same in all processes, so that gradients are summed over them."""
        return module

    def before_forward(self, module: nn.Module, *, last: bool) -> None:
        """Say before a forward pass of a wrapped module whether its backward pass ends an update: then gradients are summed."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this process's part of a loss."""
        torch.autograd.backward(loss)

    def gather_weights(self, source: nn.Module, target: nn.Module) -> None:
        """Give ``target``, a plain copy of the module that was wrapped, the weights of ``source``, the wrapped one. All processes together."""

    def drop_weights(self, target: nn.Module) -> None:
        """Free the memory of that copy's weights."""

    def module_state(self, module: nn.Module, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """A copy, on the CPU, of a wrapped module's state dict (of these names, if any are given) as a single process would have it.
        All processes together.

        Only process 0 gets the values; the others get empty tensors.
        """
        return {
            name: tensor.detach().to("cpu", copy=True) for name, tensor in module.state_dict().items() if names is None or name in names
        }

    def optimiser_state(self, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
        """The same for the optimiser of a wrapped module: its state dict, which counts parameters in their order."""
        state: dict[str, Any] = _mapped(optimiser.state_dict(), lambda tensor: tensor.detach().to("cpu", copy=True))
        return state

    def load_module(self, module: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
        """Give a wrapped module what :meth:`module_state` made, in a run of any number of processes; each process must have it whole.

        Not ``strict``: what is not in the state stays as it is.
        """
        module.load_state_dict(state, strict=strict)

    def load_optimiser(self, optimiser: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """The same for what :meth:`optimiser_state` made."""
        optimiser.load_state_dict(_mapped(dict(state), lambda tensor: tensor.clone()))


class ProcessGroup(Parallel):
    """One of several processes; made by :func:`processes`."""

    def __init__(self, kind: Literal["ddp", "fsdp2"], device: torch.device, plain: dist.ProcessGroup | None = None) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.sharded = kind == "fsdp2"
        self._device = device
        self._plain = plain  # what carries plain data, with more patience; None: the default group

    def gather(self, items: Sequence[T]) -> list[T]:
        parts = self._all(list(items))
        return [parts[i % self.world_size][i // self.world_size] for i in range(sum(map(len, parts)))]

    def broadcast(self, value: T) -> T:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._plain)
        return box[0]

    def summed(self, values: Mapping[str, float]) -> dict[str, float]:
        parts = self._all(dict(values))
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: sum(part[name] for part in parts if name in part) for name in names}

    def _all(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, value, group=self._plain)
        return parts

    def micro_batches(self, lengths: Sequence[int], batched: Callable[[list[int]], list[list[int]]]) -> list[list[int]]:
        by_length = sorted(range(len(lengths)), key=lambda i: lengths[i])  # neighbours are alike: each process gets as much work
        everyones = [batched(sorted(by_length[rank :: self.world_size])) for rank in range(self.world_size)]
        own = everyones[self.rank]
        return own + [[] for _ in range(max(map(len, everyones)) - len(own))]

    @torch.no_grad()
    def broadcast_weights(self, module: nn.Module) -> None:
        dist.barrier(self._plain)  # process 0 may have trained alone for long
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor, src=0)

    def wrap(self, module: nn.Module) -> nn.Module:
        if not self.sharded:
            wrapped = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
            wrapped.broadcast_buffers = False  # ours are constants
            return wrapped
        mesh = init_device_mesh(self._device.type, (self.world_size,))
        layers = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
        for part in list(module.modules()):
            if type(part).__name__ in layers or part is getattr(module, "value_head", None):  # a head is float32: one group has one type
                fully_shard(part, mesh=mesh, reshard_after_forward=True)
        # also the root's weights (embeddings) are given back after a forward pass: parameters() are shards whenever no pass runs
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        return module

    def before_forward(self, module: nn.Module, *, last: bool) -> None:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module.require_backward_grad_sync = last  # what its no_sync() sets; it is read in the forward pass and in the backward pass

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss * self.world_size)  # both forms average over the processes

    @torch.no_grad()
    def gather_weights(self, source: nn.Module, target: nn.Module) -> None:
        if self.sharded:
            for shard, parameter in zip(source.parameters(), target.parameters(), strict=True):
                parameter.data = whole(shard)

    def drop_weights(self, target: nn.Module) -> None:
        if self.sharded:
            for parameter in target.parameters():
                parameter.data = parameter.data.new_empty(0)

    def module_state(self, module: nn.Module, names: Collection[str] | None = None) -> dict[str, Tensor]:
        state = _unwrapped(module).state_dict()
        return {name: self._saved(tensor) for name, tensor in state.items() if names is None or name in names}

    def optimiser_state(self, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
        state: dict[str, Any] = _mapped(optimiser.state_dict(), self._saved)
        return state

    def _saved(self, tensor: Tensor) -> Tensor:
        gathered = whole(tensor)  # one at a time, and off the device at once
        return gathered.to("cpu", copy=True) if self.main else torch.empty(0)

    def load_module(self, module: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
        plain = _unwrapped(module)
        own = plain.state_dict()
        plain.load_state_dict({name: _as(own.get(name), tensor) for name, tensor in state.items()}, strict=strict)

    def load_optimiser(self, optimiser: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        entries = {
            index: {name: _as(parameters[index], value) if value.dim() else value.clone() for name, value in entry.items()}
            for index, entry in state["state"].items()
        }  # Adam's count of steps has no dimension and is not sharded
        optimiser.load_state_dict({**state, "state": entries})


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module whose names are those of the one that was wrapped."""
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all processes; any other as it is. Without gradient."""
    own = tensor.detach()
    return own.full_tensor() if isinstance(own, DTensor) else own


def _as(own: Tensor | None, given: Tensor) -> Tensor:
    """A copy of a whole tensor, sharded as ``own`` is; each process has it whole, so that nothing is sent."""
    if not isinstance(own, DTensor):
        return given.clone()
    return distribute_tensor(given.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Nested dicts and lists with ``function`` of each tensor in them."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _mapped(item, function) for key, item in value.items()}
    return [_mapped(item, function) for item in value] if isinstance(value, list) else value


@contextmanager
def processes(kind: Kind = "auto", device: torch.device | str = "cpu") -> Iterator[Parallel]:
    """The processes of this launch, ready to work together: :class:`Parallel` alone, or under ``torchrun`` a :class:`ProcessGroup`.

    Parameters
    ----------
    kind
        ``ddp``, ``fsdp2``, or ``auto``: ``ddp`` under ``torchrun``.
    device
        Where the model will be. On CUDA each process of a machine takes the GPU of its place there, through NCCL; on the CPU gloo connects them.

    Raises
    ------
    ConfigurationError
        If a form for several processes is asked for in a process that ``torchrun`` did not start, or a machine has fewer GPUs than processes.
    ParallelError
        If the connection to another process is lost in the work inside.
    """
    if kind not in get_args(Kind):
        raise ConfigurationError(f"parallel must be one of {list(get_args(Kind))}; got {kind!r}.")
    if not launched():
        if kind != "auto":
            raise ConfigurationError(
                f"parallel={kind} is for several processes, and this is one alone. Start it with torchrun: "
                "`torchrun --nproc-per-node 2 -m searchqa_agents.cli train ...`."
            )
        yield Parallel()
        return
    here, device = place(), _own_device(torch.device(device))
    # plain data is gathered over gloo; NCCL carries what is on GPUs
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=device if device.type == "cuda" else None)
        plain = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield ProcessGroup("ddp" if kind == "auto" else kind, device, plain)
        dist.barrier(plain)  # no process leaves while another still works
        dist.destroy_process_group()  # not on the way out of an error: with NCCL it would wait for work that never ends
    except Exception as error:
        error.add_note(f"In process {here.rank} of {here.world_size}.")
        if isinstance(error, dist.DistError) or (type(error) is RuntimeError and ("gloo" in str(error) or "NCCL" in str(error))):
            raise ParallelError(
                "The connection to another process is lost: it has failed (its own message says why), was killed, or does not answer. All stop; "
                f"`searchqa train resume=<run>` goes on from the last checkpoint. ({str(error).splitlines()[0].rpartition('] ')[2]})"
            ) from error
        raise


def _own_device(device: torch.device) -> torch.device:
    """The device of this process. Raises ``ConfigurationError`` where it cannot be."""
    here = place()
    if str(device) not in ("cpu", "cuda"):
        raise ConfigurationError(f"Several processes need device=cpu, or device=cuda, of which each takes its own; got {device}.")
    if device.type == "cpu":
        return device
    if here.local_rank >= torch.cuda.device_count():
        raise ConfigurationError(
            f"Each process needs a GPU of its own; process {here.rank} is number {here.local_rank + 1} on its machine, which has "
            f"{torch.cuda.device_count()}. Give torchrun a smaller --nproc-per-node."
        )
    torch.cuda.set_device(here.local_rank)
    return torch.device("cuda", here.local_rank)


def shared_rollout(
    parallel: Parallel, venv: VectorEnv[Any, Any, Any], model: LanguageModel, questions: Sequence[int | str], **arguments: Any
) -> list[Trajectory]:
    """:func:`~searchqa_agents.rollout.rollout` with the questions shared by the processes: each has all trajectories, the same as one process's.

    A question's place in ``questions`` determines its samples, whoever plays it.
    """
    places = parallel.share(range(len(questions)))
    own = rollout(venv, model, [questions[i] for i in places], places=places, **arguments)
    size = len(own) // max(len(places), 1)
    groups = parallel.gather([own[start : start + size] for start in range(0, len(own), size or 1)])
    return [trajectory for group in groups for trajectory in group]
