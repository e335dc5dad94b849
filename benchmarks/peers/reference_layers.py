"""Quantize or prune with a reference repository's own layer code, on the CPU; saves a dense checkpoint to score.

    python benchmarks/peers/reference_layers.py spqr MODEL OUT --repo SpQR --ids ROWS [--threads 1]

Engines: ``spqr`` (Vahe1994/SpQR), ``sparsegpt``, ``sparsegpt-2:4``, ``sparsegpt-int4`` (IST-DASLab/sparsegpt),
``squeezellm``, ``squeezellm-sparse`` (SqueezeAILab/SqueezeLLM); ``--repo`` is a checkout of it. Their drivers want CUDA
and libraries of 2023, so this file walks the blocks in their place, in float32, and calls what they call with the
settings of their READMEs. All layers of a block are solved from one pass, as by their defaults. What stands in for the
rest is said at each engine. Needs torch, transformers, tqdm; SqueezeLLM scikit-learn too.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peer_job import read_ids, report
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Facts = dict[str, float]


def blocks(model: Any, ids: Tensor, visit: Callable[[dict[str, nn.Linear], Callable[[], Any]], None]) -> None:
    """Carry rows through the blocks; ``visit(layers, run)`` changes a block's layers, ``run`` passes all rows by."""
    seen: list[tuple[Tensor, dict[str, Any]]] = []

    class Stop(Exception):
        pass

    def catch(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0], kwargs))
        raise Stop

    hook = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for row in ids:
        with contextlib.suppress(Stop):
            model(row[None], use_cache=False)
    hook.remove()
    states, kwargs = [x for x, _ in seen], [k for _, k in seen]
    for block in model.model.layers:
        run = partial(outputs, block, states, kwargs)
        visit({n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}, run)
        states = run()


def outputs(block: nn.Module, states: list[Tensor], kwargs: list[dict[str, Any]]) -> list[Tensor]:
    found = [block(x, **k) for x, k in zip(states, kwargs, strict=True)]
    return [y[0] if isinstance(y, tuple) else y for y in found]


def gathered(engine: Callable[[nn.Linear], Any], layers: dict[str, nn.Linear], run: Callable[[], Any]) -> list[Any]:
    """One engine a layer, with the layer's inputs in it."""
    engines = [engine(m) for m in layers.values()]
    hooks = [
        m.register_forward_hook(lambda _, i, o, e=e: e(i[0], o)) for m, e in zip(layers.values(), engines, strict=True)
    ]
    run()
    for h in hooks:
        h.remove()
    return engines


def spqr(model: Any, ids: Tensor) -> Facts:
    """Their README's command: 3 bits in groups of 16, statistics of 3 bits over 16 rows, threshold 0.2."""
    from spqr_engine import SPQRUtil

    how: dict[str, Any] = {"bits": 3, "groupsize": 16, "perchannel": True, "sym": False, "round_zero": False}
    how |= {"qq_scale_bits": 3, "qq_zero_bits": 3, "qq_groupsize": 16, "qq_zero_sym": False}
    how |= {"outlier_relative_threshold": 0.2, "permutation_order": "act_order", "percdamp": 1.0, "verbose": False}
    kept = weights = 0

    class Engine(SPQRUtil):  # type: ignore[misc]
        def __call__(self, x: Tensor, _: Tensor) -> None:
            self.add_batch(x)

    def visit(layers: dict[str, nn.Linear], run: Callable[[], Any]) -> None:
        nonlocal kept, weights
        for engine in gathered(Engine, layers, run):
            found = engine.quantize(**how)
            engine.layer.weight.data = found.weight
            kept += int(found.unstructured_outlier_mask.sum())
            weights += found.weight.numel()

    blocks(model, ids, visit)
    # Their own count: 3 + 6/16 + 64/256 + 32 bits for each weight that is kept.
    return {"kept": kept / weights, "bits_per_weight": 3 + 6 / 16 + 2 * 32 / 256 + 32 * kept / weights}


def sparsegpt(kind: str) -> Callable[[Any, Tensor], Facts]:
    def run_it(model: Any, ids: Tensor) -> Facts:
        """``torch.cuda.synchronize``, which they call to time a layer, does nothing here."""
        torch.cuda.synchronize = lambda *_: None
        from quant import Quantizer
        from sparsegpt import SparseGPT

        class Engine(SparseGPT):  # type: ignore[misc]
            def __call__(self, x: Tensor, y: Tensor) -> None:
                self.add_batch(x, y)

        zeros = weights = 0

        def visit(layers: dict[str, nn.Linear], run: Callable[[], Any]) -> None:
            nonlocal zeros, weights
            for engine in gathered(Engine, layers, run):
                if kind == "int4":  # a scale for each row: their code has no groups
                    engine.quantizer = Quantizer()
                    engine.quantizer.configure(4, perchannel=True, sym=False, mse=False)
                engine.fasterprune(0.5, *((2, 4) if kind == "2:4" else (0, 0)), percdamp=0.01, blocksize=128)
                w = engine.layer.weight
                zeros, weights = zeros + int((w == 0).sum()), weights + w.numel()

        blocks(model, ids, visit)
        return {"zeros": zeros / weights}

    return run_it


def squeezellm(sparse: bool) -> Callable[[Any, Tensor], Facts]:
    def run_it(model: Any, ids: Tensor, gradients: Path | None = None) -> Facts:
        """Squared gradients of single rows are summed here, as their fork of transformers does; its k-means and its
        choice of outliers are theirs. ``np.cast``, which numpy 2 no longer has, is put back. The width of the range
        that makes 0.40 % of the weights outliers is found by bisection: they leave it to the user.
        """
        import numpy as np

        np.cast = {"byte": lambda x: np.asarray(x, np.int8)}  # type: ignore[attr-defined]
        from nuq import kmeans_fit
        from squeezellm.outliers import remove_outliers

        layers = {n: m for n, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)}
        if gradients and gradients.exists():
            fisher = load_file(gradients)
        else:
            fisher = squared_gradients(model, ids, layers)
            if gradients:
                save_file(fisher, gradients)
        weights = {n: m.weight.detach().clone() for n, m in layers.items()}
        kept: dict[str, Tensor] = {}
        if sparse:
            ranges = {n: quartiles(w.numpy()) for n, w in weights.items()}
            width = bisect(lambda r: share(weights, ranges, r) - 0.0040)
            limits = {n: limit(ranges[n], width) for n in weights}
            found = remove_outliers(weights, sensitivity=0.05, outlier_config=limits, gradients=fisher)
            kept = dict(zip(weights, found[0], strict=True))
        for n, w in weights.items():
            rows = []
            for x, f in zip(w.numpy(), fisher[n].numpy() * (w.numpy() != 0), strict=True):
                centers, labels = kmeans_fit((x.reshape(-1, 1), f if f.sum() else np.ones_like(f), 8))
                rows.append(torch.from_numpy(centers)[torch.from_numpy(labels).long()])
            dense = torch.stack(rows)
            # Their product adds the sparse weights to the table's entry for zero.
            layers[n].weight.data = (dense + kept[n] if sparse else dense).float()
            print(n, flush=True, file=sys.stderr)
        count, columns = sum(w.numel() for w in weights.values()), sum(w.numel() / w.shape[1] for w in weights.values())
        entries = sum(int((k != 0).sum()) for k in kept.values()) / count
        return {"kept": entries, "bits_per_weight": 3 + 128 * columns / count + 32 * entries}

    return run_it


def squared_gradients(model: Any, ids: Tensor, layers: dict[str, nn.Linear]) -> dict[str, Tensor]:
    fisher = {n: torch.zeros_like(m.weight) for n, m in layers.items()}
    model.requires_grad_(False)
    for m in layers.values():
        m.weight.requires_grad_(True)
    with torch.enable_grad():
        for row in ids:
            model(row[None], labels=row[None], use_cache=False).loss.backward()
            for n, m in layers.items():
                assert m.weight.grad is not None
                fisher[n] += m.weight.grad.square()
                m.weight.grad = None
    return fisher


def quartiles(w: Any) -> tuple[float, float]:
    import numpy as np

    return float(np.quantile(w, 0.25)), float(np.quantile(w, 0.75))


def limit(q: tuple[float, float], r: float) -> float:
    """As in their generate_outlier_config.py."""
    spread = q[1] - q[0]
    return max(abs(q[0] - r * spread), abs(q[1] + r * spread))


def share(weights: dict[str, Tensor], ranges: dict[str, tuple[float, float]], r: float) -> float:
    over = sum(int((w.abs() > limit(ranges[n], r)).sum()) for n, w in weights.items())
    return over / sum(w.numel() for w in weights.values())


def bisect(f: Callable[[float], float], low: float = 0.5, high: float = 8.0) -> float:
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) > 0 else (low, middle)
    return high


ENGINES: dict[str, tuple[str, Callable[..., Facts]]] = {
    "spqr": (".", spqr),
    "sparsegpt": (".", sparsegpt("")),
    "sparsegpt-2:4": (".", sparsegpt("2:4")),
    "sparsegpt-int4": (".", sparsegpt("int4")),
    "squeezellm": ("quantization", squeezellm(False)),
    "squeezellm-sparse": ("quantization", squeezellm(True)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("engine", choices=list(ENGINES))
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--repo", type=Path, required=True)
    parser.add_argument(
        "--ids", type=Path, required=True, help='safetensors file with an int64 tensor "ids" [rows, seq]'
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--gradients", type=Path, help="SqueezeLLM: squared gradients, read when the file exists, else written"
    )
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, engine = ENGINES[args.engine]
    sys.path[:0] = [str(args.repo / folder), str(args.repo)]
    if args.threads:
        torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    started = time.perf_counter()
    with torch.no_grad():
        facts = engine(model, read_ids(args.ids), **({"gradients": args.gradients} if args.gradients else {}))
    seconds = time.perf_counter() - started
    model.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
    report(tool=args.repo.name, engine=args.engine, seconds=seconds, **facts)


if __name__ == "__main__":
    main()
