"""Score a model in foreign software against the original, token by token, without our package.

    python benchmarks/peers/kl.py CHECKPOINT REFERENCE --reference-states FILE --out scores.safetensors [--load-in-8bit]

FILE holds ``ids`` int64 [windows, ctx] and ``states`` float32 [windows, ctx, d], the hidden states that enter the
output embedding of REFERENCE. ``scores`` is float64 [4, windows * (ctx - 1)]: the negative log-likelihood of the
original and of the model, KL(original || model), and 1 where their likeliest tokens agree. `--load-in-8bit` has
bitsandbytes quantize CHECKPOINT (a dense model) while it is loaded.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from peer_job import report
from safetensors.torch import load_file, save_file
from torch import Tensor

CHUNK = 256  # tokens whose logits exist at once


def load(path: Path, in_8bit: bool) -> Any:
    """The causal LM, in float32 where it is not quantized."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": "cpu"} if in_8bit else {}
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **how).eval()


def compare(p: Tensor, q: Tensor, targets: Tensor) -> Tensor:
    """float64 [4, n] from logits float32 [n, V] of the original and of the model."""
    zp, zq = p.logsumexp(-1, keepdim=True), q.logsumexp(-1, keepdim=True)
    nll_p, nll_q = ((z - x.gather(-1, targets[:, None]))[:, 0] for x, z in ((p, zp), (q, zq)))
    kl = ((p - zp).exp() * (p - q - (zp - zq))).sum(-1).clamp_min(0)
    return torch.stack([x.double() for x in (nll_p, nll_q, kl, p.argmax(-1) == q.argmax(-1))])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--reference-states", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--load-in-8bit", action="store_true")
    args = parser.parse_args()
    given = load_file(args.reference_states)
    original = load(args.reference, False).get_output_embeddings()
    model = load(args.checkpoint, args.load_in_8bit)
    model(given["ids"][:1, :8])  # compressed-tensors unpacks weights when the whole model is called
    body, head, found = model.base_model, model.get_output_embeddings(), []
    for row, states in zip(given["ids"], given["states"], strict=True):
        own = body(row[None]).last_hidden_state[0, :-1]
        for h, g, t in zip(states[:-1].split(CHUNK), own.split(CHUNK), row[1:].split(CHUNK), strict=True):
            found.append(compare(original(h).float(), head(g).float(), t))
    save_file({"scores": torch.cat(found, 1)}, args.out)
    kinds = {type(m).__module__.split(".")[0] for m in model.modules()} - {"torch", "transformers"}
    report(loader=", ".join(sorted(kinds)) or "transformers", threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
