"""The probe: held-out rows through the original and the quantized model, side by side, one block at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.pipeline.walk import Walk

CHUNK = 256


@dataclass
class Probe:
    """Hidden states ``[rows, tokens, width]`` float32 of both streams; ``ids`` are the held-out rows."""

    walk: Walk
    ids: Tensor
    reference: Tensor
    hidden: Tensor

    @classmethod
    def start(cls, walk: Walk, ids: Tensor) -> Probe:
        """Embed the rows. ``ids`` int64 ``[rows, tokens]``."""
        hidden = walk.source.embed(ids)
        return cls(walk, ids, hidden, hidden.clone())

    def original(self, i: int) -> None:
        """Move the reference past block ``i`` as it was."""
        self.reference = self.walk.forward(self.walk.source.block(i), i, self.reference)

    def quantized(self, i: int, stored: Mapping[str, Tensor]) -> None:
        """Move the other stream past block ``i`` as it was written."""
        self.hidden = self.walk.forward(self.walk.restored(i, stored), i, self.hidden)

    def finish(self, head: Tensor | None = None) -> dict[str, float]:
        """KL(P‖Q) in nats per token, top-1 agreement, and both perplexities, over every scored token. ``head`` is the
        output head's weight as it was written, if that was quantized.
        """
        tail = self.walk.source.tail()
        other = tail if head is None else self.walk.source.tail(weight=head)
        total, agree, tokens, nll = 0.0, 0, 0, [0.0, 0.0]
        for row in range(len(self.ids)):
            for a in range(0, self.ids.shape[1] - 1, CHUNK):
                target = self.ids[row, a + 1 : a + 1 + CHUNK]
                b = a + len(target)
                with self.walk.steady(len(target)):
                    p = torch.log_softmax(tail(self.reference[row, a:b].float()), -1)
                    q = torch.log_softmax(other(self.hidden[row, a:b].float()), -1)
                    kl = (p.exp() * (p - q)).sum(-1)  # a sum over all at once would be split among threads
                total += float(kl.sum())
                agree += int((p.argmax(-1) == q.argmax(-1)).sum())
                tokens += len(target)
                for k, x in enumerate((p, q)):
                    nll[k] -= float(x.gather(1, target[:, None]).sum())
        ppl = [float(torch.tensor(x / tokens).exp()) for x in nll]
        return {
            "kl_mean": total / tokens,
            "top1": agree / tokens,
            "perplexity_original": ppl[0],
            "perplexity": ppl[1],
            "tokens": float(tokens),
        }
