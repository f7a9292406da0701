"""What one process of a training run has in memory, estimated from shapes alone, and what would make it fit.

The formulas follow this package's own code: which tensors a layer of Llama and Qwen2 keeps for the backward pass was counted with
``torch.autograd.graph.saved_tensors_hooks``, and ``tests/benchmarks/bench_plan_memory.py`` compares the sums with what processes really take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from searchqa_agents.model_shapes import empty_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FLOAT32, BFLOAT16 = 4, 2
"""bytes of a number"""
PROGRAM = {"cpu": 700_000_000, "cuda": 1_500_000_000}
"""bytes of a process that has torch and transformers loaded; on CUDA those of its context and its libraries' workspaces"""


class Shape(NamedTuple):
    """A model's counts of parameters and its sizes; all counted on the meta device."""

    parameters: int
    trained: int
    """parameters with a gradient: all, or those of the adapters"""
    decoder: int
    """of ``parameters``, those below the output layer: embeddings, layers, last norm"""
    linear: int
    """weights of all linear layers of the decoder"""
    output: int
    """weights of the output layer, which may be the embeddings' too"""
    largest: int
    """of the trained parameters"""
    layers: int
    hidden: int
    attention: int
    """heads times their size"""
    keys: int
    """heads of keys times their size"""
    feed_forward: int
    heads: int
    vocab_size: int
    max_positions: int
    rank: int
    """of LoRA; 0 without"""


def measure_shape(config: PreTrainedConfig, lora: Mapping[str, Any] | None = None) -> Shape:
    """The counts of a model of this configuration, with adapters where ``lora`` has arguments of :func:`~searchqa_agents.lora.add_lora`."""
    import torch

    model: Any = empty_model(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    decoder = model.get_decoder()
    linear = sum(part.weight.numel() for part in decoder.modules() if isinstance(part, torch.nn.Linear))
    below = sum(parameter.numel() for parameter in decoder.parameters())
    if lora:
        from searchqa_agents.lora import add_lora

        holder: Any = SimpleNamespace(model=model, device=torch.device("meta"))  # all that adapters need of a policy
        add_lora(holder, **lora)
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    sizes: Any = config
    head = getattr(sizes, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads
    return Shape(
        parameters=parameters,
        trained=sum(trained),
        decoder=below,
        linear=linear,
        output=sizes.vocab_size * sizes.hidden_size,
        largest=max(trained),
        layers=sizes.num_hidden_layers,
        hidden=sizes.hidden_size,
        attention=sizes.num_attention_heads * head,
        keys=(getattr(sizes, "num_key_value_heads", None) or sizes.num_attention_heads) * head,
        feed_forward=sizes.intermediate_size,
        heads=sizes.num_attention_heads,
        vocab_size=sizes.vocab_size,
        max_positions=sizes.max_position_embeddings,
        rank=int((lora or {}).get("rank", 16)) if lora else 0,
    )


@dataclass(frozen=True)
class Work:
    """What one process has to hold: the model, how it is trained, and how much at once."""

    shape: Shape
    weight_bytes: int
    """4 or 2, of a number of the model's weights"""
    autocast: bool
    """training computes in bfloat16"""
    device: str
    """cpu or cuda"""
    processes: int = 1
    sharded: bool = False
    reference: bool = False
    """a copy of the policy as training begins; none under LoRA, which is without it when its adapters are off"""
    critic: str | None = None
    """shared or separate"""
    checkpointing: bool = False
    max_tokens: int = 16_384
    context: int = 4096
    """the longest sequence"""
    prompt: int = 256
    slots: int = 1
    """episodes that are played at the same time"""
    sequences: int = 1
    """of a minibatch, in this process"""
    saves: bool = True
    """whether checkpoints are written"""

    @property
    def trained_bytes(self) -> int:
        """Of a number of a trained weight: adapters are float32."""
        return FLOAT32 if self.shape.rank else self.weight_bytes

    @property
    def evaluated(self) -> int:
        """Tokens of a micro-batch at most: as many as allowed, or one sequence that is longer, or all there are."""
        return max(self.context, min(self.max_tokens, self.sequences * self.context))


class Memory(NamedTuple):
    """Bytes on the device by part, in each phase of a step."""

    rollout: Mapping[str, float]
    update: Mapping[str, float]
    checkpoint: Mapping[str, float]

    @property
    def peaks(self) -> dict[str, float]:
        """The sum of each phase."""
        return {phase: sum(parts.values()) for phase, parts in self._asdict().items()}

    @property
    def peak(self) -> float:
        """Of the phase that takes most."""
        return max(self.peaks.values())


def layer_activations(work: Work) -> int:
    """Bytes per token that one layer keeps for the backward pass.

    For a layer as Llama's and Qwen2's: two norms in float32, four projections of attention, three of the feed-forward part, fused attention.
    With D hidden, A attention, K keys, I feed-forward: a norm keeps its float32 input and, where its weight is trained, its result; a linear layer
    keeps its input, once for layers that share it, or under autocast and under adapters of another type a copy of its own; attention keeps queries,
    keys, values, result and a float32 number per head; SwiGLU keeps its two halves, their activation and their product.
    """
    shape, lora = work.shape, work.shape.rank > 0
    d, a, k, i = shape.hidden, shape.attention, shape.keys, shape.feed_forward
    compute = BFLOAT16 if work.autocast else work.weight_bytes
    adapters = FLOAT32 if lora and not work.autocast else compute  # the type in which adapters read their input
    norms = 2 * d * FLOAT32 + (0 if lora else 2 * d * work.weight_bytes)
    copied = work.autocast or adapters != compute
    inputs = (5 * d + a) * adapters if copied else (2 * d + a) * compute
    result = a * compute if copied and lora else 0  # of attention: else it is the output projection's input itself
    states = (a + 2 * k) * compute
    feed_forward = 3 * i * compute + i * adapters
    ranks = 7 * shape.rank * adapters
    return norms + inputs + result + states + feed_forward + ranks + (shape.heads + 2) * FLOAT32


def activations(work: Work) -> float:
    """Bytes that a micro-batch's forward passes keep for the backward pass, and what is held for a moment where most is held.

    A critic of its own is evaluated behind the policy, and both are kept until one backward pass. Autocast's copies of float32 weights are kept too;
    with checkpointing only until a trunk has been read.
    """
    shape, tokens = work.shape, work.evaluated
    trunks = 2 if work.critic == "separate" else 1
    layer = tokens * layer_activations(work)
    casts = shape.linear * BFLOAT16 if work.autocast and work.weight_bytes == FLOAT32 else 0
    compute = BFLOAT16 if work.autocast else work.weight_bytes
    under_way = tokens * (2 * shape.feed_forward + 4 * shape.hidden) * compute  # gradients, in one layer
    if not work.checkpointing:
        return trunks * (shape.layers * layer + casts) + under_way
    kept = shape.layers * tokens * shape.hidden * work.weight_bytes
    return trunks * kept + max(casts, layer + casts / shape.layers + under_way)


def output_layer(work: Work) -> float:
    """Bytes of a chunk of logits and of what the output layer's gradient is summed up in."""
    shape = work.shape
    rows = max(128, (2**22 if work.device == "cpu" else 2**26) // shape.vocab_size)
    chunk = rows * shape.vocab_size * (3 * FLOAT32 + (BFLOAT16 if work.autocast or work.weight_bytes == BFLOAT16 else 0))
    gradient = 0 if shape.rank else shape.output * FLOAT32  # beside the one that it is added to
    cast = shape.output * BFLOAT16 * (1 if shape.rank else 2) if work.autocast else 0  # the weights, and a chunk's gradient
    return chunk + gradient + cast


def cache_cells(work: Work) -> int:
    """Cells of each slot of the attention cache once an episode has its longest context: as :class:`~searchqa_agents.slot_cache.SlotCache` grows."""
    cells = -(-(1 + work.prompt) // 64) * 64
    while cells < 1 + work.context:
        cells = -(-max(cells + 1, cells * 3 // 2) // 64) * 64
    return cells


def cache_bytes_per_token(work: Work) -> int:
    """Keys and values of one token in all layers, in the type of the weights."""
    return work.shape.layers * 2 * work.shape.keys * work.weight_bytes


def memory(work: Work) -> Memory:
    """What one process has on its device."""
    shape, one = work.shape, work.weight_bytes
    share = work.processes if work.sharded else 1
    program = {"program": float(PROGRAM.get(work.device, PROGRAM["cuda"]))}
    adapters = (shape.trained if shape.rank else 0) * FLOAT32
    weights = shape.parameters * one + adapters
    critic = shape.decoder * one + adapters if work.critic == "separate" else 0
    trained = shape.trained * work.trained_bytes
    critic_trained = 0 if work.critic != "separate" else trained if shape.rank else shape.decoder * one
    reference = shape.parameters * one if work.reference else 0
    resident = {
        "weights": weights / share,
        "reference": reference / share,
        "critic": critic / share,
        "AdamW": 2 * (trained + critic_trained) / share,
    }
    fed = min(2048 if work.device == "cpu" else 16_384, work.slots * work.context)
    rollout = {
        **program,
        **resident,
        "gathered weights": float(weights if work.sharded else 0),
        "attention cache": float(work.slots * cache_cells(work) * cache_bytes_per_token(work)),
        "logits and reading": float(work.slots * shape.vocab_size * 3 * FLOAT32 + fed * (3 * shape.feed_forward + 6 * shape.hidden) * one),
    }
    unsharded = 0.0
    if work.sharded:  # weights, and under full training gradients, of the root's own part and of two layers; a critic has no output layer
        layers = 2 * shape.linear / max(shape.layers, 1)
        trunks = [shape.parameters - shape.linear, *([shape.decoder - shape.linear] if work.critic == "separate" else [])]
        unsharded = sum(own + layers for own in trunks) * one * (1 if shape.rank else 2)
    # AdamW on the CPU holds two numbers for each of the weights that it is at, when activations are gone; CUDA's fused form holds none
    stepping = 2 * shape.largest * work.trained_bytes if work.device == "cpu" else 0
    passing = activations(work) + output_layer(work)
    update = {
        **program,
        **resident,
        "gradients": (trained + critic_trained) / share,
        "unsharded": unsharded,
        "activations": max(passing, float(stepping)),
    }
    copied = 3 * (trained + critic_trained) if shape.rank else weights + reference + critic + 2 * (trained + critic_trained)
    checkpoint = {
        **program,
        **resident,
        "gathered weights": float(weights if work.sharded else 0),
        "copies to save": float(copied if work.saves and work.device == "cpu" else 0),  # they are made in the host's memory
    }
    return Memory(rollout, update, checkpoint)


def host_copies(work: Work) -> float:
    """Bytes of the host's memory that the first process holds while it saves what is on its device."""
    if work.device == "cpu" or not work.saves:
        return 0.0
    return disk(work)


def disk(work: Work) -> float:
    """Bytes of one checkpoint: the model as a folder, and the trainer's state."""
    shape, one = work.shape, work.weight_bytes
    trained = shape.trained * work.trained_bytes
    state = 3 * trained  # weights and AdamW's two means
    if work.critic == "separate":
        state += 3 * (trained if shape.rank else shape.decoder * one)
    return shape.parameters * one + state + (shape.parameters * one if work.reference else 0)


def advice(work: Work, limit: float, lora: Callable[[], Shape] | None = None) -> tuple[list[str], Memory]:
    """Overrides of the command line, in the order in which they are worth trying, until all phases fit ``limit`` bytes; and what they lead to.

    Each is kept only where it takes something off the phases that do not fit. ``lora`` gives the shape with adapters.
    """
    said: list[str] = []

    def excess(of: Work) -> float:
        return sum(max(0.0, peak - limit) for peak in memory(of).peaks.values())

    def take(words: str, changed: Work) -> None:
        nonlocal work
        before = excess(work)
        if before > 0 and excess(changed) < 0.98 * before:
            said.append(words)
            work = changed

    def fewer_slots() -> None:
        slots = work.slots
        while slots > 1 and memory(replace(work, slots=slots)).peaks["rollout"] > limit:
            slots //= 2
        if memory(replace(work, slots=slots)).peaks["rollout"] <= limit:
            take(f"num_envs={slots}", replace(work, slots=slots))

    fewer_slots()
    take("algo.gradient_checkpointing=true", replace(work, checkpointing=True))
    if work.max_tokens > work.context:
        take(f"algo.max_tokens={work.context}", replace(work, max_tokens=work.context))
    if work.device != "cpu" and not work.autocast:
        take("algo.precision=bfloat16", replace(work, autocast=True))
    if work.processes > 1 and not work.sharded:
        take("parallel=fsdp2", replace(work, sharded=True))
    if work.critic == "separate":
        take("algo.critic=shared", replace(work, critic="shared"))
    fewer_slots()
    if not work.shape.rank and lora is not None and excess(work) > 0:
        take("lora.rank=16 dtype=bfloat16", replace(work, shape=lora(), reference=False, weight_bytes=BFLOAT16))
        fewer_slots()
    return said, memory(work)


def flops(work: Work, sampled: int) -> tuple[float, float, float]:
    """Floating-point operations on one sequence of the longest context: to read it, to read it with log-probabilities, and of its update.

    2 per weight and token forward, twice that backward (once where the weights have no gradient, as under LoRA), once more forward with
    checkpointing; causal attention 2 A T^2 per layer forward; the output layer for ``sampled`` tokens, whose logits are computed again backward.
    """
    shape, tokens = work.shape, work.context
    forward = 2.0 * shape.linear * tokens
    attention = 2.0 * shape.layers * shape.attention * tokens**2
    output = 2.0 * shape.output * sampled
    backward = forward * (1 if shape.rank else 2) + 2 * attention
    again = forward + attention if work.checkpointing else 0.0
    return forward + attention, forward + attention + output, forward + attention + backward + again + output * (3 if shape.rank else 4)


def human(size: float) -> str:
    """Bytes as GB of 10^9."""
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.1f} MB"
