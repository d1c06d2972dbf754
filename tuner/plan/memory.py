"""The memory of a rank in each phase of a step, part by part; the largest is what must fit."""

from typing import NamedTuple

from tuner.plan.holding import Held, Sizes, count, hold
from tuner.plan.setup import Setup
from tuner.plan.trace import Activations, Phases, trace

GIB = 2**30
CONTEXT = 1.0 * GIB  # of CUDA, cuBLAS and NCCL, beside what torch allocates
FRAGMENTATION = 0.04  # of what comes and goes: blocks that are free and of no use
LABELS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "checkpoints": "activations kept for backward",
    "working_set": "working set of a layer",
    "logits": "logits, gradient of the head",
    "communication": "gathered weights, buckets",
    "reserve": "CUDA, NCCL, fragmentation",
}
SOURCES = {
    "weights": "formula",
    "gradients": "formula",
    "optimizer": "formula",
    "checkpoints": "traced",
    "working_set": "traced",
    "logits": "traced",
    "communication": "formula",
    "reserve": "formula",
}


class Parts(NamedTuple):
    """Bytes on a rank at one moment."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    checkpoints: float = 0.0  # what backward needs of all layers
    working_set: float = 0.0  # of the layer, or the embedding, that computes
    logits: float = 0.0  # of a chunk, and the gradient of the head
    communication: float = 0.0  # gathered weights, buckets
    reserve: float = 0.0  # fragmentation, and what is no tensor

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


class Memory(NamedTuple):
    """What a rank needs."""

    phases: dict[str, Parts]
    sizes: Sizes

    @property
    def peak_phase(self) -> str:
        """Where most is needed."""
        return max(self.phases, key=lambda name: self.phases[name].total)

    @property
    def peak(self) -> Parts:
        """What is needed there."""
        return self.phases[self.peak_phase]


def memory_of(setup: Setup, sizes: Sizes | None = None) -> Memory:
    """Trace the computation, and add what the strategy holds; `sizes` of the model, where they were counted before."""
    sizes = sizes or count(setup)
    activations = trace(setup.computation())
    held = hold(setup, sizes)
    phases = phases_of(setup, sizes, held, activations)
    if (scoring := setup.scoring()) is not None:
        phases["needles"] = between_steps(held, trace(scoring).at(scoring.num_layers))
    if not setup.on_cpu:
        phases = {name: with_reserve(parts) for name, parts in phases.items()}
    return Memory(phases, sizes)


def phases_of(setup: Setup, sizes: Sizes, held: Held, activations: Activations) -> dict[str, Parts]:
    """Parts by phase.

    Gradients come from the head down to the embedding unless they lie ready from the start; in a step of several
    micro-batches they are there from the second on.
    """
    num_layers = setup.model.get_text_config().num_hidden_layers
    whole, one = activations.at(num_layers), activations.at(1)
    always = Parts(held.weights, 0.0, held.optimizer)
    per_weight = held.gradient / max(1, sizes.trained)
    is_there = held.is_static or setup.num_accumulation_steps > 1

    def gradients(done: int) -> float:
        return held.gradient if is_there else per_weight * done

    below_head = sizes.trained - sizes.embedding
    kept = whole.kept
    forward = always._replace(
        gradients=gradients(0),
        checkpoints=kept,
        working_set=max(0.0, whole.forward - kept),
        communication=held.gathered,
    )
    loss = always._replace(
        gradients=gradients(0), checkpoints=kept, logits=max(0.0, whole.loss - kept), communication=held.at_loss
    )
    head = loss._replace(logits=max(0.0, whole.head - kept))
    last = always._replace(
        gradients=gradients(sizes.head),
        checkpoints=kept,
        working_set=max(0.0, whole.backward - kept),
        communication=held.gathered + held.reducing,
    )
    first = always._replace(
        gradients=gradients(below_head),
        checkpoints=one.kept,
        working_set=max(0.0, one.backward - one.kept),
        communication=held.gathered + held.reducing,
    )
    end = always._replace(
        gradients=gradients(below_head), working_set=whole.end, communication=held.at_loss + held.reducing
    )
    update = always._replace(gradients=held.gradient, communication=max(0.0, held.updating))
    return {
        "forward": forward,
        "head and loss": loss,
        "backward of the head": head,
        "backward of the last layer": last,
        "backward of the first layer": first,
        "backward of the embedding": end,
        "optimizer step": update,
    }


def between_steps(held: Held, scoring: Phases) -> Parts:
    """While documents are scored: no layer keeps anything, and no gradient is there but in buffers that stay."""
    return Parts(
        weights=held.weights,
        gradients=held.gradient if held.is_static else 0.0,
        optimizer=held.optimizer,
        working_set=scoring.forward,
        logits=max(0.0, scoring.loss - scoring.forward),
        communication=max(held.gathered, held.at_loss),
    )


def with_reserve(parts: Parts) -> Parts:
    """With what a GPU cannot give to tensors."""
    passing = parts.checkpoints + parts.working_set + parts.logits + parts.communication + parts.gradients
    return parts._replace(reserve=CONTEXT + FRAGMENTATION * passing)
