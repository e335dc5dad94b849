"""A model on disk, one block in memory at a time.

The skeleton is transformers' own model on the meta device (no memory); a block's weights are copied out of the
memory-mapped file when it is asked for and freed when it is dropped.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import CheckpointError, RequestError
from fewbits.model import Shell, Site, Slot, families, get_weight, locate, match, set_weight, unstack_experts
from fewbits.storage import Checkpoint

SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
REWRITTEN = frozenset({"config.json", "model.safetensors.index.json", "quantize_config.json", "quant_config.json"})


class Source:
    """A causal language model to read from; open it with :meth:`open`.

    It has ``path``, ``config`` (transformers'), ``raw_config`` (config.json as it is), ``checkpoint`` and ``family``.
    """

    def __init__(self, path: Path, config: Any, raw_config: dict[str, Any], checkpoint: Checkpoint):
        self.path, self.config, self.raw_config, self.checkpoint = path, config, raw_config, checkpoint
        self.family = families.find_family(config.get_text_config().model_type)
        model = locate.skeleton(config)
        self._path = locate.find_blocks(model)
        rename, prefix = locate.renaming(model), model.base_model_prefix
        unstack_experts(model)
        wanted = {name: t.shape for name, t in model.state_dict().items()}
        self._parameters = [name for name, _ in model.named_parameters()]
        self._slots, self._rest = match(checkpoint, wanted, str(prefix), self.family.names, rename)
        self._tied: dict[str, str] = dict(model.all_tied_weights_keys)  # type: ignore[arg-type]
        self._shell = Shell(model, self._path, self._materialise, self._table)
        self._kwargs: dict[int, list[dict[str, Any]]] = {}
        self._verify(wanted)

    @classmethod
    def open(cls, source: str | Path, trust_remote_code: bool = False) -> Source:
        """Open a transformers directory or a hub id.

        Raises RequestError (no such model, not a causal language model, already quantized, code of its own), FetchError
        (the hub cannot be reached) and CheckpointError (damaged files, tensors missing or of another shape).
        """
        path = locate.directory(source)
        raw = locate.read_config(path)
        quantization = raw.get("quantization_config") or {}
        if quantization and quantization.get("format") != "dense":
            method = quantization.get("quant_method", "unknown method")
            raise RequestError(f"{source} is already quantized ({method}); give the original model")
        config = locate.config(path, raw, trust_remote_code)
        return cls(path, config, raw, Checkpoint.open(path))

    # ---- what there is -----------------------------------------------------------------------------------------------

    @property
    def text_config(self) -> Any:
        """The language model's config; the config itself unless the model has other parts."""
        return self.config.get_text_config()

    @property
    def n_blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self._shell.blocks)

    def block_prefix(self, i: int) -> str:
        """Path of block ``i`` in memory (``model.layers.3``); see :meth:`disk_name` for names in the checkpoint."""
        return f"{self._path}.{i}"

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the blocks' weights are stored in."""
        count: dict[torch.dtype, int] = {}
        for slot in self._slots.values():
            dtype = self.checkpoint.dtype(slot.stored)
            count[dtype] = count.get(dtype, 0) + math.prod(slot.shape(self.checkpoint))
        return max(count, key=lambda d: count[d])

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise RequestError(
                f"{self.path} has no tokenizer that transformers can load: {locate.first_line(e)}"
            ) from e

    def tokenizer(self) -> Any:
        """The model's tokenizer (loaded once). Raises RequestError when there is none."""
        return self._tokenizer

    def copy_files(self) -> list[Path]:
        """Files beside the weights that a copy of the model needs: tokenizer, chat template, generation config."""
        found = {p for pattern in SIDE_FILES for p in self.path.glob(pattern) if p.is_file()}
        return sorted(p for p in found if p.name not in REWRITTEN and not p.name.endswith(".index.json"))

    def outside(self) -> list[str]:
        """Names on disk that belong to no block: embeddings, final norm, head, and whatever the model does not use."""
        prefix = self._path + "."
        inside = {s.stored for n, s in self._slots.items() if n.startswith(prefix)}
        return [n for n in self.checkpoint.names() if n not in inside]

    def block_tensors(self, i: int) -> list[str]:
        """Names on disk of the tensors of block ``i`` as they are stored (a stack of experts is one name)."""
        prefix = self.block_prefix(i) + "."
        return sorted({s.stored for n, s in self._slots.items() if n.startswith(prefix)})

    def disk_name(self, i: int, local: str) -> str:
        """Name on disk, without ``.weight``, of a linear of block ``i`` (``self_attn.q_proj``)."""
        return self._slots[f"{self.block_prefix(i)}.{local}.weight"].disk.removesuffix(".weight")

    @cached_property
    def head_name(self) -> str:
        """Name of the output head on disk, without ``.weight``; in memory where it is tied and stored nowhere."""
        name = self._head[0]
        slot = self._slots.get(f"{name}.weight")
        return name if slot is None else slot.disk.removesuffix(".weight")

    @property
    def tied(self) -> bool:
        """Whether the output head is the input embedding."""
        return f"{self._head[0]}.weight" in self._tied

    @property
    def head_shape(self) -> tuple[int, int]:
        """``(vocabulary, width)``."""
        out, columns = get_weight(self._head[1]).shape
        return int(out), int(columns)

    # ---- blocks ------------------------------------------------------------------------------------------------------

    def block(self, i: int, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Block ``i`` with its own writable weights in ``dtype``, in eval mode, without gradients.

        Raises CheckpointError naming the tensor when a weight is NaN or infinite.
        """
        block = _copy(self._shell.blocks[i], self.config)
        self._materialise(block, self.block_prefix(i), (), dtype)
        self.checkpoint.release()
        return block

    def skeleton(self, i: int) -> nn.Module:
        """Block ``i`` on the meta device: names and shapes without weights. Not to be changed."""
        return self._shell.blocks[i]

    def linears(self, block: nn.Module) -> dict[str, nn.Module]:
        """Every weight of a block that may be quantized, by local name, in the family's order."""
        return {name: block.get_submodule(name) for stage in self.stages(block) for name in stage}

    def stages(self, block: nn.Module) -> tuple[tuple[str, ...], ...]:
        """Linears that share one input, in execution order."""
        return families.stages(self.family, block)

    def sites(self, block: nn.Module) -> tuple[Site, ...]:
        """Channel axes that can be scaled without changing the block's function."""
        return families.sites(self.family, block, self.text_config)

    def ties(self, block: nn.Module) -> tuple[tuple[str, ...], ...]:
        """Linears that servers fuse into one, so that they want one grid."""
        return families.ties(self.family, block)

    def state(
        self, block: nn.Module, i: int, without: Collection[str] = (), dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Dense tensors of block ``i`` under their names on disk, in the checkpoint's own dtype or in ``dtype``.

        ``without`` are local names of linears whose weight is left out (their bias is not).
        """
        prefix, skip = self.block_prefix(i), {f"{name}.weight" for name in without}
        found = {}
        for name, t in block.state_dict().items():
            slot = self._slots.get(f"{prefix}.{name}")
            if slot is None or name in skip:
                continue
            target = self.checkpoint.dtype(slot.stored)
            if dtype is not None and target.is_floating_point:
                target = dtype
            found[slot.disk] = t.detach().to(target).contiguous()
        return found

    def load_state(self, block: nn.Module, i: int, stored: Mapping[str, Tensor]) -> None:
        """Give block ``i`` those of ``stored`` (by name on disk) that belong to it: the inverse of :meth:`state`."""
        prefix = self.block_prefix(i)
        for name, t in block.state_dict().items():
            slot = self._slots.get(f"{prefix}.{name}")
            if slot is not None and slot.disk in stored:
                t.copy_(stored[slot.disk])

    # ---- around the blocks -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prelude(self, ids: Tensor, batch: int = 8) -> tuple[Tensor, list[dict[str, Any]]]:
        """What reaches block 0, and every block's keyword arguments (see :meth:`block_kwargs`).

        ``ids`` int64 ``[rows, T]`` without padding -> float32 ``[rows, T, d]``, computed ``batch`` rows at a time.
        """
        hidden = torch.cat([self.embed(part) for part in ids.split(batch)])
        return hidden, self.block_kwargs(ids.shape[1])

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """What reaches block 0 for one batch of rows; reads only the embeddings of the tokens that occur."""
        hidden = self._shell.embed(ids)
        self.checkpoint.release()
        return hidden

    @torch.no_grad()
    def block_kwargs(self, length: int) -> list[dict[str, Any]]:
        """Keyword arguments of every block for rows of ``length`` tokens; valid for any number of rows."""
        if length not in self._kwargs:
            self._kwargs = {length: self._shell.kwargs(length)}
        return self._kwargs[length]

    def head(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The output head with its own writable weight in ``dtype``."""
        name, module = self._head
        head = _copy(module, self.config)
        self._materialise(head, name, (), dtype)
        self.checkpoint.release()
        return head

    @torch.no_grad()
    def before_head(self, hidden: Tensor) -> Tensor:
        """What enters the output head for ``hidden [rows, T, d]`` after the last block: ``[rows, T, width]``."""
        seen: list[Tensor] = []
        self._shell.logits(hidden, self._head[0], _Record(seen))
        return seen[0]

    def tail(
        self, dtype: torch.dtype = torch.float32, weight: Tensor | None = None, grad: bool = False
    ) -> Callable[[Tensor], Tensor]:
        """What follows the last block: ``hidden [..., T, d]`` -> logits ``[..., T, vocabulary]`` float32.

        Holds the output head in ``dtype`` as long as it lives, with ``weight [vocabulary, width]`` in place of its own
        if given. Give few tokens at a time: logits are large. With ``grad`` gradients flow to ``hidden``.
        """
        name, head = self._head[0], self.head(dtype)
        if weight is not None:
            set_weight(head, weight)

        def logits(hidden: Tensor) -> Tensor:
            rows = hidden.reshape(-1, *hidden.shape[-2:])
            with torch.set_grad_enabled(grad):
                return self._shell.logits(rows, name, head).float().view(*hidden.shape[:-1], -1)

        return logits

    # ---- inside ------------------------------------------------------------------------------------------------------

    @property
    def _head(self) -> tuple[str, nn.Module]:
        return self._shell.named(self._shell.model.get_output_embeddings())  # type: ignore[operator]

    def _table(self) -> Tensor:
        name, _ = self._shell.named(self._shell.model.get_input_embeddings())  # type: ignore[operator]
        return self._slot(f"{name}.weight").read(self.checkpoint)

    def _slot(self, name: str) -> Slot:
        # Tied weights are stored once, under either name.
        tied = [name, self._tied.get(name, ""), *(t for t, s in self._tied.items() if s == name)]
        found = next((n for n in tied if n in self._slots), None)
        if found is None:
            raise CheckpointError(f"{self.path}: tensor {name} is missing; download the model again")
        return self._slots[found]

    def _materialise(
        self, module: nn.Module, prefix: str, skip: Iterable[str] = (), dtype: torch.dtype = torch.float32
    ) -> None:
        """Give ``module`` its weights from the file, and its computed buffers as transformers initialises them."""
        skipped = set(skip)
        for parent_name, parent in module.named_modules():
            for leaf, kind in _tensors(parent):
                name = ".".join(p for p in (prefix, parent_name, leaf) if p)
                known = name in self._slots or name in self._tied
                if name in skipped or not (known or kind is nn.Parameter):
                    continue
                t = self._read(name, dtype)
                if kind is nn.Parameter:
                    parent._parameters[leaf] = nn.Parameter(t, requires_grad=False)
                    parent._parameters[leaf]._is_hf_initialized = True
                else:
                    parent._buffers[leaf] = t
            self._fill_buffers(parent)
        module.eval()

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        slot = self._slot(name)
        stored = slot.read(self.checkpoint)
        t = stored.to(dtype, copy=True) if stored.is_floating_point() else stored.clone()
        # aminmax propagates NaN and needs no temporary of the tensor's size
        if t.is_floating_point() and t.numel() and not all(torch.isfinite(x) for x in t.aminmax()):
            raise CheckpointError(f"{self.path}: tensor {slot.stored} holds NaN or Inf; download the model again")
        return t

    def _fill_buffers(self, module: nn.Module) -> None:
        """Compute buffers that no file holds (rotary frequencies, embedding scales) by the model's own initialiser."""
        empty = [n for n, b in module._buffers.items() if b is not None and b.is_meta]
        if not empty:
            return
        for n in empty:  # NaN marks what the initialiser leaves alone; integers have none and stay meta
            module._buffers[n] = _unset(module._buffers[n])  # type: ignore[arg-type]
        self._shell.decoder._init_weights(module)  # type: ignore[operator]
        for n in empty:
            b = module._buffers[n]
            if b is not None and (b.is_meta or bool(b.isnan().any())):
                raise RequestError(f"{type(module).__name__}.{n} is not in the checkpoint and cannot be computed")

    def _verify(self, wanted: dict[str, torch.Size]) -> None:
        """Every weight of the decoder and the head is there and every tensor has its shape, before any work."""
        parts = (f"{self._path}.", f"{self._shell.named(self._shell.decoder)[0]}.", f"{self._head[0]}.")
        for name in self._parameters:
            if name.startswith(parts):
                self._slot(name)
        for name, slot in self._slots.items():
            found = slot.shape(self.checkpoint)
            if tuple(found) != tuple(wanted[name]):
                raise CheckpointError(
                    f"{self.path}: tensor {slot.stored} is {found}, config.json wants {tuple(wanted[name])}"
                )


class _Record(nn.Module):
    """Stands where the output head was: keeps what enters, and hands on a vocabulary of one word."""

    def __init__(self, seen: list[Tensor]):
        super().__init__()
        self.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return x[..., :1]


def _copy(module: nn.Module, config: Any) -> nn.Module:
    """A copy of a module on the meta device that shares the model's config."""
    shared = {id(c): c for c in (config, config.get_text_config())}
    return copy.deepcopy(module, shared)


def _tensors(module: nn.Module) -> list[tuple[str, type]]:
    """Names of a module's own parameters and buffers, and which of the two each is."""
    parameters = [(n, nn.Parameter) for n, p in module._parameters.items() if p is not None]
    return [*parameters, *((n, Tensor) for n, b in module._buffers.items() if b is not None)]


def _unset(buffer: Tensor) -> Tensor:
    return torch.full_like(buffer, float("nan"), device="cpu") if buffer.is_floating_point() else buffer
