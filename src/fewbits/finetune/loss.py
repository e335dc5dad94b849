"""The loss of a causal language model without the logits of a whole batch.

The head is frozen, so the gradient of its input is known as soon as the loss is: a few hundred predictions at a time go
through the head and back. Predictions that are not learned (labels of -100) are skipped. At 50,000 words, logits of
2,048 tokens, their gradient and what lies between would be 1.2 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fewbits.errors import RequestError
from fewbits.finetune.data import IGNORED

CHUNK = 256
"""Predictions whose logits exist at once."""
PROBE = 16
SCORED = "scored"
"""Keyword with which a hooked model gives the loss of a batch: the number of predictions to divide by, or None."""

Score = Callable[[Tensor, slice], Tensor]


class _Losses(torch.autograd.Function):
    """Sum of ``score(h, part)`` over slices ``part`` of ``hidden [n, d]``; nothing else gets a gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, score: Score) -> Tensor:
        total, grad = torch.zeros((), device=hidden.device), torch.empty_like(hidden)
        for begin in range(0, len(hidden), CHUNK):
            part = slice(begin, begin + CHUNK)
            with torch.enable_grad():
                h = hidden[part].detach().requires_grad_()
                loss = score(h, part)
                (grad[part],) = torch.autograd.grad(loss, h)
            total += loss.detach()
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad * dy, None


class Loss:
    """Mean negative log-likelihood in nats of a batch of :func:`fewbits.finetune.data.collate`.

    ``chunked`` says whether the model's logits are made as this file knows (head, scale, soft cap); other models'
    losses are transformers' own.
    """

    def __init__(self, model: Any):
        self.model = model
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.decoder, self.linear = inner.get_decoder(), inner.get_output_embeddings()
        text = inner.config.get_text_config()
        self.inner = inner
        self.scale = float(getattr(text, "logit_scale", None) or 1) / float(getattr(text, "logits_scaling", None) or 1)
        self.cap = float(getattr(text, "final_logit_softcapping", None) or 0)
        self.chunked = False

    def check(self, batch: Mapping[str, Tensor]) -> Loss:
        """Compare both ways on a few tokens of ``batch``; the chunked one is used if they agree."""
        frozen = isinstance(self.linear, nn.Module) and not any(p.requires_grad for p in self.linear.parameters())
        if not frozen or self.decoder is None:
            return self
        few = {k: t[:1, :PROBE] for k, t in batch.items()}
        few["labels"] = few["input_ids"].clone()
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            own = self._own(few, None)
            self.chunked = torch.allclose(self._by_chunks(few, None), own.float(), rtol=1e-3, atol=1e-4)
        self.model.train(training)
        return self

    def hook(self) -> None:
        """Let the model's own forward pass give this loss where it is called with ``SCORED``."""
        forward = self.inner.forward

        def scored(*args: Any, **given: Any) -> Any:
            if SCORED not in given:
                return forward(*args, **given)
            count = given.pop(SCORED)
            return self({k: v for k, v in given.items() if v is not None}, count)

        self.inner.forward = scored

    def __call__(self, batch: Mapping[str, Tensor], count: Tensor | int | None = None) -> Tensor:
        """The sum over the batch divided by ``count`` predictions; None: by those that are learned."""
        return self._by_chunks(batch, count) if self.chunked else self._own(batch, count)

    def _own(self, batch: Mapping[str, Tensor], count: Tensor | int | None) -> Tensor:
        given = {} if count is None else {"num_items_in_batch": count}
        loss: Tensor = self.model(**batch, use_cache=False, **given).loss
        return loss

    def _by_chunks(self, batch: Mapping[str, Tensor], count: Tensor | int | None) -> Tensor:
        hidden, targets, at = self._learned(batch)
        score = self._score(batch, targets, at)
        total: Tensor = _Losses.apply(hidden, score)
        return total / (len(targets) if count is None else count)

    def _learned(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states ``[n, d]`` before each learned token, those tokens, and their places in the batch."""
        inputs = {k: t for k, t in batch.items() if k != "labels"}
        hidden = self.decoder(**inputs, use_cache=False)[0]
        targets = batch["labels"][:, 1:].reshape(-1)
        at = (targets != IGNORED).nonzero()[:, 0]
        hidden = hidden[:, :-1].reshape(len(targets), -1)
        return (hidden, targets, at) if len(at) == len(targets) else (hidden[at], targets[at], at)

    def _score(self, batch: Mapping[str, Tensor], targets: Tensor, at: Tensor) -> Score:
        return lambda h, part: F.cross_entropy(self.head(h).float(), targets[part], reduction="sum")

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states ``[n, d]``."""
        logits = self.linear(hidden)
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.cap == 0 else torch.tanh(logits / self.cap) * self.cap


class Distance(Loss):
    """KL(teacher || model) in nats per learned token, in place of the likelihood of the text.

    Raises RequestError when one of the models makes its logits in a way that is not known here.
    """

    def __init__(self, model: Any, teacher: Any, batch: Mapping[str, Tensor]):
        super().__init__(model)
        self.teacher = Loss(teacher).check(batch)
        self.check(batch)
        if not (self.chunked and self.teacher.chunked):
            raise RequestError(
                f"{type(teacher).__name__} has a head that is not known here; learn from text (--no-distill)"
            )
        self._score = self._divergence  # type: ignore[method-assign]

    def _divergence(self, batch: Mapping[str, Tensor], targets: Tensor, at: Tensor) -> Score:
        with torch.no_grad():
            theirs = self.teacher._learned(batch)[0]

        def score(h: Tensor, part: slice) -> Tensor:
            with torch.no_grad():
                log_p = self.teacher.head(theirs[part]).float().log_softmax(-1)
            return F.kl_div(self.head(h).float().log_softmax(-1), log_p, reduction="sum", log_target=True)

        return score
