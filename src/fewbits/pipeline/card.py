"""The model card that goes with a checkpoint: how it was made, how to load it, what was measured."""

from __future__ import annotations

import json

from fewbits.model import Source
from fewbits.plan import Plan

LOADERS = {
    "compressed-tensors": "vLLM, transformers with compressed-tensors, or transformers after `import fewbits`",
    "gptq": "vLLM, transformers with GPTQModel, or transformers after `import fewbits`",
    "awq": "vLLM, transformers with GPTQModel, or transformers after `import fewbits`",
    "bitsandbytes": "transformers with bitsandbytes, or transformers after `import fewbits`",
    "gguf": "llama.cpp and what builds on it (`model.gguf`), or `fewbits eval`",
    "fewbits": "transformers after `import fewbits`",
}


def card(source: Source, plan: Plan, bits_per_weight: float, kl: dict[str, float] | None, events: str) -> str:
    """Markdown with a YAML head; holds nothing that differs between two identical runs."""
    errors = [(e["error"], e["name"]) for e in map(json.loads, events.splitlines()) if "error" in e]
    name = source.path.name
    lines = [
        "---",
        "library_name: transformers",
        "tags: [quantized, fewbits]",
        "---",
        f"# {name}, {plan.method}, {bits_per_weight:.2f} bits per weight",
        "",
        f"Quantized with fewbits: method `{plan.method}`, format `{plan.format}`.",
        f"Loads in {LOADERS.get(plan.format, 'fewbits')}.",
        "",
        "```python",
        "import fewbits  # not needed where the format's own loader is installed",
        "from transformers import AutoModelForCausalLM",
        'model = AutoModelForCausalLM.from_pretrained("PATH")',
        "```",
        "",
        "## Measured",
    ]
    if kl:
        lines += [
            "",
            f"On {int(kl['tokens'])} held-out tokens of the calibration text, against the original:",
            "",
            "| KL(P‖Q), nats per token | top-1 agreement | perplexity | original's perplexity |",
            "| --- | --- | --- | --- |",
            f"| {kl['kl_mean']:.4f} | {kl['top1']:.3f} | {kl['perplexity']:.3f} | {kl['perplexity_original']:.3f} |",
        ]
    worst = sorted(errors, reverse=True)[:5]
    if worst:
        lines += ["", "Largest relative output errors by layer:", "", "| layer | error |", "| --- | --- |"]
        lines += [f"| {n} | {e:.4f} |" for e, n in worst]
    return "\n".join([*lines, "", "## Recipe", "", "```yaml", plan.to_yaml().rstrip(), "```", ""])
