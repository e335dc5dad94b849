"""Load a quantized checkpoint with foreign software, without our package, and say what it is worth.

    python benchmarks/peers/load_and_dump.py CHECKPOINT --ids rows.safetensors [--loader L] [--windows 5] [--dump DIR]

`--loader transformers` is `AutoModelForCausalLM.from_pretrained` with whatever that environment has installed beside it
(compressed-tensors; optimum and GPTQModel for gptq and awq); `--loader gptqmodel` is `GPTQModel.load`.

Each quantized layer is asked for its weight through its own forward pass: fed the identity matrix it answers with the
transpose. So the figure rests on the foreign unpacking and dequantization and on nothing of ours, and it is computed in
float32 although most foreign kernels run in half precision only (`--native` scores the model as loaded). `--dump DIR`
writes those dense weights as an ordinary checkpoint, which any evaluation can score.
"""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

# Compiling a dequantization for minutes to call it once per layer does not pay.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from peer_job import read_ids, report
from torch import Tensor, nn
from torch.nn import functional as F

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# GPTQModel's portable kernels; its faster ones for CPUs round weights to bfloat16.
PORTABLE = {"gptq": "gptq_torch", "awq": "awq_torch"}
BYTES_BEYOND_WEIGHTS = ("*.json", "*.jinja", "*.model", "*.txt")


def quantization_of(checkpoint: Path) -> dict:
    """The quantization entry of config.json; empty for a dense checkpoint."""
    return json.loads((checkpoint / "config.json").read_text()).get("quantization_config", {})


def load(checkpoint: Path, loader: str, dtype: torch.dtype) -> Any:
    """The causal LM, as a torch module with whatever layers the loader puts in."""
    if loader == "transformers":
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
    from gptqmodel import BACKEND, GPTQModel

    method = quantization_of(checkpoint).get("quant_method", "gptq")
    return GPTQModel.load(str(checkpoint), backend=BACKEND(PORTABLE[method]), device="cpu", dtype=dtype).model.eval()


def is_layer(module: nn.Module) -> bool:
    """A linear layer, dense or quantized; foreign ones are known by their shape attributes."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


@torch.no_grad()
def weight_of(layer: Any, dtype: torch.dtype) -> Tensor:
    """Dense weight [out, in], float32, as the layer applies it. Leaves of the identity are exact in any float type."""
    answer = layer(torch.eye(layer.in_features, dtype=dtype)[None])[0].float()
    if getattr(layer, "bias", None) is not None:
        answer = answer - layer.bias.float()
    return answer.T.contiguous()


def densify(model: Any, dtype: torch.dtype) -> int:
    """Replace each linear layer of the decoder by an nn.Linear with the weight it applies; how many were quantized."""
    head = model.get_output_embeddings()
    found = [(name, layer) for name, layer in model.named_modules() if is_layer(layer) and layer is not head]
    quantized = 0
    for name, layer in found:
        dense = nn.Linear(layer.in_features, layer.out_features, bias=getattr(layer, "bias", None) is not None)
        dense.weight.data = weight_of(layer, dtype)
        if dense.bias is not None:
            dense.bias.data = layer.bias.detach().float()
        quantized += type(layer) is not nn.Linear or hasattr(layer, "quantization_scheme")
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, dense)
    nn.Module.float(model)  # transformers' own float() refuses models that were quantized
    return quantized


def restore_unquantized(model: nn.Module, checkpoint: Path) -> None:
    """Norms, embeddings and biases straight from the file: the loader's half precision has rounded them."""
    from safetensors import safe_open

    parameters = dict(model.named_parameters())
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in set(tensors.keys()) & set(parameters):
                parameters[name].data.copy_(tensors.get_tensor(name))


@torch.no_grad()
def perplexity(model: Any, ids: Tensor, chunk: int = 256) -> float:
    """exp of the mean loss of every token but the first of each window; `ids` int64 [windows, ctx]."""
    total = torch.zeros((), dtype=torch.float64)
    head, body = model.get_output_embeddings(), model.base_model
    for row in ids:
        hidden = body(row[None]).last_hidden_state[0, :-1]
        for states, targets in zip(hidden.split(chunk), row[1:].split(chunk), strict=True):
            total += F.cross_entropy(head(states).float(), targets, reduction="sum").double()
    return (total / (len(ids) * (ids.shape[1] - 1))).exp().item()


def dump(model: nn.Module, checkpoint: Path, out: Path) -> None:
    """An ordinary dense float32 checkpoint: one safetensors file, config without quantization, tokenizer."""
    from safetensors.torch import save_file

    out.mkdir(parents=True)
    for pattern in BYTES_BEYOND_WEIGHTS:
        for file in checkpoint.glob(pattern):
            if not file.name.endswith(".index.json") and file.name != "quantize_config.json":
                shutil.copyfile(file, out / file.name)
    config = json.loads((checkpoint / "config.json").read_text())
    config.pop("quantization_config", None)
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2))
    tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
    keep = {name: p.detach().contiguous() for name, p in model.named_parameters() if name not in tied}
    save_file(keep, out / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--ids", type=Path, required=True, help='safetensors file with an int64 tensor "ids" [rows, ctx]'
    )
    parser.add_argument("--loader", choices=("transformers", "gptqmodel"), default="transformers")
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="what it is loaded in; default by its kernels")
    parser.add_argument(
        "--native", action="store_true", help="score the model as loaded, in the foreign kernels' precision"
    )
    parser.add_argument("--dump", type=Path, metavar="DIR", help="write the dense weights as a checkpoint")
    args = parser.parse_args()
    if args.native and args.dump:
        parser.error("--native and --dump: the dense weights are what --native leaves out; give one of them")
    ids = read_ids(args.ids)[: args.windows]
    half = quantization_of(args.checkpoint).get("quant_method") in PORTABLE
    dtype = DTYPES[args.dtype or ("float16" if half else "float32")]
    model = load(args.checkpoint, args.loader, dtype)
    model(ids[:1, :8])  # some loaders unpack on the first pass of the whole model
    layers = 0
    if not args.native:
        layers = densify(model, dtype)
        restore_unquantized(model, args.checkpoint)
    if args.dump:
        dump(model, args.checkpoint, args.dump)
    report(
        loader=args.loader,
        perplexity=perplexity(model, ids),
        windows=len(ids),
        ctx=ids.shape[1],
        compute=str(next(model.parameters()).dtype if args.native else torch.float32).removeprefix("torch."),
        quantized_layers=layers,
    )


if __name__ == "__main__":
    main()
