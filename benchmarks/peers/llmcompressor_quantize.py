"""Quantize with llm-compressor, in its own environment.

    python benchmarks/peers/llmcompressor_quantize.py MODEL OUT --ids rows.safetensors --bits 4 --group-size 64

Only what the request names is set: everything else is llm-compressor's default, batch size 1 included. The model is
loaded in float32, as ours is.
"""

import time
from importlib.metadata import version

from peer_job import as_samples, quantize_arguments, read_ids, report


def scheme(bits: int, group_size: int, symmetric: bool) -> dict:
    """The request in the words of compressed-tensors: integer weights on every linear layer."""
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    weights |= {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}


def recipe(method: str, what: dict) -> list:
    """Modifiers. AWQ only rescales there: rounding is a modifier of its own."""
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    if method == "gptq":
        return [GPTQModifier(**what)]
    import torch
    from llmcompressor.modifiers.transform import AWQModifier

    if not torch.accelerator.is_available():
        # Its AWQ (0.14.0.1) pins memory for copies to an accelerator, which is an error where there is none.
        torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]
    return [AWQModifier(), QuantizationModifier(**what)]


def main() -> None:
    args = quantize_arguments("llm-compressor", ("gptq", "awq"))
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = read_ids(args.ids)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    started = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_list(as_samples(ids)),
        recipe=recipe(args.method, scheme(args.bits, args.group_size, args.symmetric)),
        max_seq_length=ids.shape[1],
        num_calibration_samples=ids.shape[0],
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - started
    model.save_pretrained(args.out, save_compressed=True)
    tokenizer.save_pretrained(args.out)
    report(tool="llmcompressor", version=version("llmcompressor"), method=args.method, seconds=seconds)


if __name__ == "__main__":
    main()
