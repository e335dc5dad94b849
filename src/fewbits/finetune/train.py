"""transformers' Trainer with our loss and optimizer, a log of every step, and checkpoints that are whole or ignored."""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from fewbits.errors import FewbitsError, RequestError
from fewbits.finetune import ranks, replay
from fewbits.finetune.base import OnEvent, Training
from fewbits.finetune.data import Row, collate
from fewbits.finetune.loss import SCORED, Distance, Loss
from fewbits.finetune.paged import PagedAdamW
from fewbits.pipeline.job import peak_rss

CHECKPOINTS, LOG = "checkpoints", "log.jsonl"
WHOLE, PAGES = "whole", "optimizer.pages"
KEPT = 2
"""Checkpoints kept: a kill while one is written leaves the one before."""


class _Rows(torch.utils.data.Dataset[Row]):
    def __init__(self, rows: Sequence[Row]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Row:
        return self.rows[i]


class _Trainer(transformers.Trainer):
    """The loss of :class:`Loss`; one that is not finite stops the run before it reaches a parameter."""

    loss: Loss
    before: Mapping[str, Tensor] | None = None

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        self.loss_is_scaled_for_ga = num_items_in_batch is not None
        # Through the model that Trainer wrapped: what gathers gradients from other processes watches its forward pass.
        loss = (
            model(**inputs, **{SCORED: num_items_in_batch})
            if ranks.several()
            else self.loss(inputs, num_items_in_batch)
        )
        loss = loss * self.accelerator.num_processes if num_items_in_batch is not None else loss
        if not math.isfinite(loss.item()):
            raise Diverged(self.state.global_step + 1, "the loss", self._sound())
        self.before = inputs
        return loss

    def _sound(self) -> bool:
        """Whether the parameters, not the data, are innocent: they give the batch before a finite loss."""
        if self.before is None:
            return True
        with torch.no_grad():
            return math.isfinite(self.loss(self.before).item())


class Diverged(FewbitsError):
    """A loss or gradient that is not finite. ``step`` was not made: parameters are those after the step before, which
    are ``sound`` unless that step is what broke them.
    """

    def __init__(self, step: int, what: str, sound: bool = True):
        self.step, self.sound = step, sound
        super().__init__(f"{what} of step {step} is not finite")


class _Watch(TrainerCallback):
    """Gradients checked before every step, the log, the events, and the mark that makes a checkpoint whole."""

    def __init__(self, out: Path, tell: OnEvent):
        self.log, self.tell = out / LOG, tell
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.began = self.cpu = self.spent = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.began, self.cpu = time.perf_counter(), time.process_time()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        grads = [p.grad for p in rest["model"].parameters() if p.grad is not None]
        if not all(bool(torch.isfinite(g).all()) for g in grads):
            raise Diverged(state.global_step + 1, "the gradient")

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)
        self.spent = time.process_time() - self.cpu

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        if "loss" not in logs or not ranks.first():
            return
        self.losses.append(logs["loss"])
        line = {
            "step": state.global_step,
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "epoch": state.epoch,
            "seconds": self.seconds[-1],
            "cpu_seconds": self.spent,
            "peak_rss_bytes": peak_rss(),
        }
        with self.log.open("a") as f:
            f.write(json.dumps(line) + "\n")
        self.tell({"event": "step", "steps": state.max_steps} | line)

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        optimizer = getattr(rest["optimizer"], "optimizer", rest["optimizer"])
        if ranks.first() and isinstance(optimizer, PagedAdamW):
            optimizer.save_pages(folder / PAGES)
        ranks.wait()  # every process adds the state of its random numbers
        if ranks.first():
            (folder / WHOLE).touch()

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        optimizer = getattr(rest["optimizer"], "optimizer", rest["optimizer"])
        if isinstance(optimizer, PagedAdamW) and (folder / PAGES).is_file():
            optimizer.load_pages(folder / PAGES)


def train(
    model: Any,
    rows: Sequence[Row],
    how: Training,
    out: Path,
    pad: int,
    resume: bool,
    tell: OnEvent,
    teacher: Any = None,
) -> dict[str, Any]:
    """Train in place what gets gradients in ``model``; checkpoints and the log go to ``out``. With a ``teacher`` the
    loss is the distance from it.

    Returns ``steps``, ``loss_first``, ``loss``, ``step_seconds``. Raises FewbitsError, naming the step, for a loss or
    gradient that is not finite; the parameters are then those of the step before.
    """
    last = newest(out / CHECKPOINTS) if resume else None
    if ranks.first():
        _cut(out / LOG, 0 if last is None else int(last.name.split("-")[1]))
    if how.checkpointing:
        _compute_again(model, how.keep_products)
    watch = _Watch(out, tell)
    trainer = _Trainer(
        model=model,
        args=_arguments(how, out, len(rows)),
        train_dataset=_Rows(rows),
        data_collator=partial(collate, pad=pad),
        callbacks=[watch],
        optimizer_cls_and_kwargs=optimizer_of(how, out, next(p for p in model.parameters() if p.requires_grad).device),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    first = collate(rows[:1], pad)
    trainer.loss = Loss(model).check(first) if teacher is None else Distance(model, teacher, first)
    if not trainer.loss.chunked:
        tell({"event": "note", "message": "logits of whole batches are made: this model's head is not a plain one"})
    if ranks.several():
        trainer.loss.hook()
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    ranks.wait()
    losses = [json.loads(line)["loss"] for line in (out / LOG).read_text().splitlines()]
    return {
        "steps": trainer.state.global_step,
        "loss_first": losses[0],
        "loss": losses[-1],
        "step_seconds": statistics.median(watch.seconds) if watch.seconds else 0.0,
    }


def newest(folder: Path) -> Path | None:
    """The latest checkpoint that is whole; None without one."""
    found = {int(p.name.split("-")[1]): p for p in folder.glob("checkpoint-*") if (p / WHOLE).is_file()}
    return found[max(found)] if found else None


def _arguments(how: Training, out: Path, rows: int) -> TrainingArguments:
    per_epoch = math.ceil(math.ceil(rows / how.batch) / how.accumulate)
    steps = how.steps if how.steps is not None else max(1, math.ceil(how.epochs * per_epoch))
    return TrainingArguments(
        output_dir=str(out / CHECKPOINTS),
        max_steps=steps,
        per_device_train_batch_size=how.batch,
        gradient_accumulation_steps=how.accumulate,
        learning_rate=how.lr,
        lr_scheduler_type="constant_with_warmup" if how.schedule == "constant" else how.schedule,
        warmup_steps=math.ceil(how.warmup * steps),
        weight_decay=how.weight_decay,
        max_grad_norm=how.max_grad_norm,
        optim="adamw_torch",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=how.save_steps,
        save_total_limit=KEPT,
        seed=how.seed,
        data_seed=how.seed,
        report_to=_reporters(),
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
    )


def _compute_again(model: Any, keep_products: bool | None) -> None:
    """Activation checkpointing, under the name that this version of transformers has for it."""
    keep = not torch.cuda.is_available() if keep_products is None else keep_products
    name = next(n for n in ("activation", "gradient") if hasattr(model, f"{n}_checkpointing_enable"))
    given = {"use_reentrant": False} | ({"context_fn": replay.contexts} if keep else {})
    getattr(model, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": given})


def _reporters() -> list[str]:
    from transformers.integrations import is_tensorboard_available

    return ["tensorboard"] if is_tensorboard_available() else []


def optimizer_of(how: Training, out: Path, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """Class and arguments of the optimizer for parameters on ``device``. Pages are a file's on a CPU; on a GPU they are
    bitsandbytes' unified memory, which the driver moves. Raises RequestError when that is missing.
    """
    common: dict[str, Any] = {"lr": how.lr, "betas": (0.9, 0.999), "eps": 1e-8}
    if how.optimizer == "adamw":
        return torch.optim.AdamW, common
    bits = 8 if how.optimizer.endswith("8bit") else 32
    if device.type == "cpu":
        return PagedAdamW, common | {"bits": bits, "memory": how.optimizer_memory, "folder": out}
    if how.optimizer_memory is not None:
        raise RequestError(f"--optimizer-memory bounds pages on disk; on {device.type} the driver moves them; drop it")
    try:
        from bitsandbytes import optim
    except ImportError:
        raise RequestError(
            f"--optimizer {how.optimizer} on {device.type} needs bitsandbytes, which is not installed; "
            "pip install bitsandbytes, or give --optimizer adamw"
        ) from None
    return (optim.PagedAdamW8bit if bits == 8 else optim.PagedAdamW32bit), common


def _cut(log: Path, step: int) -> None:
    """Drop the log's lines after ``step``: those steps are made again. A line that a kill cut short goes too."""
    if not log.is_file():
        return
    whole = [line for line in log.read_text().splitlines() if re.fullmatch(r"\{.*\}", line)]
    log.write_text("".join(line + "\n" for line in whole if json.loads(line)["step"] <= step))
