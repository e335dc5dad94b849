"""What a fine-tuning run is told, and what it says at the end: plain data."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from fewbits.activations import Activations
from fewbits.errors import RequestError

OnEvent = Callable[[dict[str, Any]], None]
OPTIMIZERS = ("adamw", "paged-adamw", "paged-adamw-8bit")
SCHEDULES = ("constant", "cosine", "linear")
METHODS = ("qlora", "lora", "qat")
BEGINNINGS = ("zero", "residual")


@dataclass(frozen=True)
class Adapter:
    """Low-rank adapters as peft has them (LoRA, arXiv 2106.09685): ``W + scale * B A`` with ``A [r, in]`` and ``B [out,
    r]``; ``scale`` is ``alpha / r``, with ``rslora`` ``alpha / sqrt(r)``; ``dora`` learns the norm of every row too.

    ``targets`` are last names of layers, or ``all-linear``: every linear layer but the output head. ``init`` is what
    ``B A`` is at first: "zero", or "residual", the best part of that rank of what rounding the base lost of the layers'
    outputs on the training data (LoftQ, QERA).
    """

    r: int = 16
    alpha: float = 16
    dropout: float = 0.05
    rslora: bool = False
    dora: bool = False
    targets: tuple[str, ...] = ("all-linear",)
    init: str = "zero"

    def __post_init__(self) -> None:
        if self.init not in BEGINNINGS:
            raise RequestError(f"--init {self.init!r} is unknown; allowed: {', '.join(BEGINNINGS)}")
        if self.init == "residual" and self.dora:
            raise RequestError("--init residual changes the norms that --dora starts from; give one of the two")
        if self.r < 1:
            raise RequestError(f"--r {self.r} is not a rank; give 1 or more, 16 is usual")
        if not self.alpha > 0:
            raise RequestError(f"--alpha {self.alpha} is not a scale; give a positive number")
        if not 0 <= self.dropout < 1:
            raise RequestError(f"--dropout {self.dropout} is not a share; give 0 or more, less than 1")


@dataclass(frozen=True)
class Rows:
    """How data becomes rows of at most ``seq_len`` tokens.

    ``packing`` puts several examples into a row, each with its own positions and blind to the others; ``truncate`` cuts
    what is longer than a row instead of refusing it; ``prompts`` counts the loss on prompts too.
    """

    seq_len: int = 512
    packing: bool = True
    truncate: bool = False
    prompts: bool = False

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise RequestError(f"--seq-len {self.seq_len} holds no prediction; give 2 or more")


@dataclass(frozen=True)
class Training:
    """Steps, optimizer and schedule. ``steps`` None means ``epochs`` passes over the rows; a step is ``batch`` rows
    times ``accumulate``. ``optimizer_memory`` are bytes of states kept resident by the paged optimizers, None for all.
    ``checkpointing`` computes blocks again in the backward pass, all but the outputs of layers with adapters if these
    are kept: ``keep_products``, None where there is no GPU.
    """

    steps: int | None = None
    epochs: float = 1.0
    batch: int = 4
    accumulate: int = 1
    lr: float = 2e-4
    schedule: str = "constant"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 0.3
    optimizer: str = "adamw"
    optimizer_memory: int | None = None
    checkpointing: bool = True
    save_steps: int = 50
    seed: int = 0
    keep_products: bool | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate", "save_steps", "epochs", "lr"):
            if not getattr(self, name) > 0:
                raise RequestError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} is not possible; give more than 0"
                )
        if self.steps is not None and self.steps < 1:
            raise RequestError(f"--steps {self.steps} trains nothing; give 1 or more")
        for name, allowed in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise RequestError(f"--{name} {getattr(self, name)!r} is unknown; allowed: {', '.join(allowed)}")
        if self.optimizer_memory is not None and self.optimizer == "adamw":
            raise RequestError(
                "--optimizer-memory bounds paged optimizers, adamw keeps its states in memory; "
                "give --optimizer paged-adamw or paged-adamw-8bit"
            )


@dataclass(frozen=True)
class Qat:
    """Quantization-aware training: ``group_size`` columns share a scale (None: the grid's own), the ``format`` of the
    checkpoint; ``distill`` makes the loss the distance from the original model. ``activations``: the inputs of the
    layers are quantized too, in training and in the checkpoint; a static scale is learned.
    """

    group_size: int | None = None
    format: str = "fewbits"
    distill: bool = True
    activations: Activations | None = None


@dataclass(frozen=True)
class Result:
    """What a run produced. ``step_seconds`` is the median; ``loss`` is of the last step, in nats per token.
    ``bits_per_weight`` is that of a checkpoint, None for adapters.
    """

    out: str
    method: str
    base: str
    steps: int
    rows: int
    trainable: int
    loss_first: float
    loss: float
    seconds: float
    step_seconds: float
    peak_rss_bytes: int
    bits_per_weight: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The keys of ``fewbits finetune --json``."""
        return asdict(self)


def require(package: str) -> None:
    """RequestError when an optional package is missing."""
    if importlib.util.find_spec(package) is None:
        raise RequestError(f"fine-tuning needs {package}, which is not installed; pip install 'fewbits[finetune]'")


def trainable(model: Any) -> int:
    """Number of parameters that get gradients."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
