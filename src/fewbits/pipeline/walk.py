"""The walk: one block at a time, observe its inputs, transform it, solve it stage by stage, pack it, go on with its
outputs.

The stream that reaches block ``i`` was computed by the quantized blocks before it. Beside it runs a probe: a few rows
of held-out text through the original and through the quantized model, which gives the KL divergence at the end
without ever holding either model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.activations import Inputs, static_scale
from fewbits.errors import FewbitsError
from fewbits.formats import Entry, Layout, pruned
from fewbits.grids import tied
from fewbits.kernels import fixed, one_thread
from fewbits.model import Site, Source, fold, get_weight, routed, set_weight
from fewbits.pipeline.acts import Acts
from fewbits.pipeline.fisher import Fisher
from fewbits.pipeline.forward import Beside, Cut, Forward, Observe, run
from fewbits.pipeline.inputs import common_scheme, quantize_inputs, require_finite
from fewbits.pipeline.mixing import Mixing
from fewbits.pipeline.precision import PRECISIONS
from fewbits.plan import Plan, Recipe
from fewbits.solve import Nearest
from fewbits.stats import Stats, loss
from fewbits.tensor import Quantized, Sparse
from fewbits.transform import Diagonal
from fewbits.tune import Products, Rows, tune

Event = dict[str, Any]
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class Block:
    """One quantized block: what is written and what is reported."""

    tensors: dict[str, Tensor]
    events: list[Event] = field(default_factory=list)


@dataclass
class Walk:
    """Everything that stays the same from block to block. ``recipes`` are by name on disk."""

    source: Source
    plan: Plan
    recipes: Mapping[str, Recipe | None]
    layout: Layout
    waiting: bool = True
    fisher: Fisher | None = None
    tell: Callable[[Event], None] = lambda event: None

    def quantize(self, i: int, acts: Acts | None, given: Mapping[int, Stats] | None = None) -> Block:
        """Quantize block ``i`` and, unless the plan needs no calibration, move ``acts`` past it.

        ``given`` are statistics of the original block's inputs (:meth:`gather`) to solve from, in place of ``acts``.
        """
        block = self.source.block(i)
        names = {local: self.source.disk_name(i, local) for local in self.source.linears(block)}
        recipes = {local: r for local, name in names.items() if (r := self.recipes[name]) is not None}
        solved: dict[str, Quantized] = {}
        events: list[Event] = []
        stats, stages = dict(given or {}), self.source.stages(block)
        if acts is not None:
            self._transform(block, i, acts, recipes)
        elif given is not None:
            self._fit(block, recipes, stats)
        recipes = settled(block, recipes, self.source.ties(block))
        needs = {s: needed(recipes[n] for n in here if n in recipes) for s, here in enumerate(stages)}
        as_it_was = copy.deepcopy(block) if acts is not None and acts.original is not None else None
        mixings = self._mixings(block, stages, needs)
        beside = {} if as_it_was is None else self._mixings(as_it_was, stages, needs, also="cross")
        fisher = {} if self.fisher is None else self.fisher.of(i)
        round_to(block, DTYPES[self.plan.dtype], set(recipes))

        def observe(stage: int, batch: int, x: Tensor) -> None:
            if not needs[stage]:
                return
            require_finite(x, names[stages[stage][0]], stats[stage].count if stage in stats else 0)
            at = acts.partner(batch) if acts is not None and "cross" in needs[stage] else None
            original = None if at is None else seen(stage, at)
            # The solver minimises the error on what the layer will really see.
            scheme = common_scheme([recipes[n] for n in stages[stage] if n in recipes])
            x = Inputs(scheme)(x) if scheme and scheme.dynamic else x
            self._observe(stats, stage, x, needs[stage], original, mixings.get(stage), beside.get(stage))

        def solve(stage: int) -> None:
            inputs = stats.pop(stage, None)
            for local in stages[stage]:
                if local in recipes:
                    solved[local], event = self._solve(block, i, local, recipes[local], inputs, fisher.get(local))
                    events.append({"event": "tensor", "block": i, "name": names[local]} | event)

        quantize_inputs(block, lambda local: solved[local].inputs if local in solved else None, recipes)
        if acts is None:
            for stage in range(len(stages)):
                solve(stage)
        else:
            with self._beside(as_it_was, i, acts, stages) as seen, watched(mixings), watched(beside):
                self._advance(block, i, acts, stages, observe, solve, keep=self.plan.tune is None)
            if self.plan.tune is not None and as_it_was is not None:
                if solved:
                    events.append(self._tune(block, i, acts, solved, as_it_was))
                self._pass(block, i, acts)
        tensors = self.source.state(block, i, without=solved, dtype=DTYPES[self.plan.dtype])
        for local, q in solved.items():
            tensors |= self.layout.pack(names[local], q)
        return Block(tensors, events)

    def needs(self, i: int) -> dict[int, frozenset[str]]:
        """What block ``i`` must know of the input of each stage, transforms included."""
        block, recipes = self.source.skeleton(i), self.recipes
        fitted = frozenset().union(*(t.needs for t in self.plan.transforms))
        found = {}
        for stage, names in enumerate(self.source.stages(block)):
            here = [r for n in names if (r := recipes[self.source.disk_name(i, n)]) is not None]
            found[stage] = fitted | needed(here) if here else frozenset()
        return found

    def gather(self, i: int, acts: Acts, needs: Mapping[int, frozenset[str]]) -> dict[int, Stats]:
        """Statistics of what enters each stage of block ``i`` as it was; moves ``acts`` past it."""
        block = self.source.block(i)
        stages = self.source.stages(block) if any(needs.values()) else ()
        stats: dict[int, Stats] = {}
        mixings = self._mixings(block, stages, needs)

        def observe(stage: int, batch: int, x: Tensor) -> None:
            if needs[stage]:
                seen = stats[stage].count if stage in stats else 0
                require_finite(x, self.source.disk_name(i, stages[stage][0]), seen)
                self._observe(stats, stage, x, needs[stage], mixing=mixings.get(stage))

        with watched(mixings):
            self._advance(block, i, acts, stages, observe, lambda s: None)
        return stats

    def head(self, acts: Acts | None) -> Block:
        """Quantize the output head; ``acts`` have passed the last block."""
        name = self.source.head_name
        recipe = self.recipes[name]
        assert recipe is not None
        stats: dict[int, Stats] = {}
        if acts is not None and recipe.solver.needs:
            for b in range(len(acts)):
                at, original = acts.partner(b), None
                if acts.original is not None and at is not None:
                    original = self.source.before_head(acts.original[at])
                self._observe(stats, 0, self.source.before_head(acts[b]), recipe.solver.needs, original)
        q, event = solve_one(get_weight(self.source.head()), recipe, stats.get(0), self.layout)
        return Block(
            self.layout.pack(name, q), [{"event": "tensor", "block": self.source.n_blocks, "name": name} | event]
        )

    def stored_head(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The weight of a finished head, float32."""
        name = self.source.head_name
        return self.layout.unpack(name, {k.removeprefix(f"{name}."): t for k, t in stored.items()}).dense()

    def replay(self, i: int, acts: Acts, stored: Mapping[str, Tensor]) -> None:
        """Move ``acts`` past a block that is already finished, exactly as :meth:`quantize` did."""
        self._pass(self.restored(i, stored, learnt=True), i, acts)
        if acts.original is not None:
            self._pass(self.source.block(i), i, acts.original)

    def restored(self, i: int, stored: Mapping[str, Tensor], learnt: bool = False) -> nn.Module:
        """Block ``i`` with the weights of its finished part, float32; ``learnt`` computes exactly as :meth:`quantize`
        did, else in the best way that there is.
        """
        block = self.source.block(i)
        codes: set[str] = set()
        inputs: dict[str, Inputs | None] = {}
        for local, module in self.source.linears(block).items():
            name = self.source.disk_name(i, local)
            if self.recipes[name] is not None:
                prefix = f"{name}."
                codes.add(f"{name}.weight")
                parts = {k.removeprefix(prefix): t for k, t in stored.items() if k.startswith(prefix)}
                q = self.layout.unpack(name, parts)
                self._set(module, q, learnt)
                inputs[local] = q.inputs
        quantize_inputs(block, inputs.get, inputs)
        self.source.load_state(block, i, {k: t for k, t in stored.items() if k not in codes})
        return block

    def forward(self, block: nn.Module, i: int, hidden: Tensor) -> Tensor:
        """A batch of few rows ``[rows, tokens, width]`` through a block, float32; no thread count changes it."""
        with nullcontext() if self._steady(block, i, hidden) else one_thread(), self._precision():
            return self._call(block, i, hidden)

    def steady(self, tokens: int) -> AbstractContextManager[Any]:
        """For products of ``tokens`` rows in float32 that no thread count changes: all threads where that is sure."""
        return self._precision() if self._surely(tokens) else one_thread()

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _solve(
        self, block: nn.Module, i: int, local: str, recipe: Recipe, inputs: Stats | None, fisher: Tensor | None
    ) -> tuple[Quantized, Event]:
        """Solve one layer from what is known of its stage's ``inputs``, and put the result in its place."""
        layer, name = block.get_submodule(local), self.source.disk_name(i, local)
        mixes = local == self.source.family.values and "mixed" in recipe.needs
        seen = inputs.of_values() if mixes and inputs is not None else inputs
        if "fisher" in recipe.needs:
            seen = replace(inputs or Stats.nothing(), fisher=fisher)
        q, event = solve_one(get_weight(layer), recipe, seen, self.layout)
        if mixes and seen is not None and seen.mixed is None:
            event.setdefault("fallback", "attention is not torch's own: values solved for their plain inputs")
        q = replace(q, inputs=inputs_of(recipe, seen, DTYPES[self.plan.dtype], name))
        self._set(layer, q)
        return q, event

    def _set(self, module: nn.Module, q: Quantized, learnt: bool = True) -> None:
        set_weight(module, q.dense())
        if learnt and isinstance(module.weight, nn.Parameter):
            PRECISIONS[self.plan.compute].learn(module.weight, q)

    def _advance(
        self,
        block: nn.Module,
        i: int,
        acts: Acts,
        stages: Sequence[Sequence[str]],
        observe: Observe,
        solve: Callable[[int], None],
        keep: bool = True,
    ) -> None:
        forwards, cut = self._forwards(block, i, acts)
        # The greenlets stop inside autocast; what happens between their steps must not inherit it.
        plain = torch.autocast("cpu", enabled=False)
        with self._precision():
            for batch, out in run(block, stages, forwards, plain(observe), plain(solve), self.waiting, cut):
                if keep:
                    acts[batch] = out

    def _forwards(self, block: nn.Module, i: int, acts: Acts) -> tuple[Sequence[Forward], Cut]:
        # A router mixes padding with what counts; its experts' products differ in length anyway.
        padded = not routed(block)
        read, cut = (acts.padded, acts.cut) if padded else (acts.__getitem__, lambda b, x: x)

        def forward(b: int) -> Forward:
            return lambda: self._call(block, i, read(b))

        return [forward(b) for b in range(len(acts))], cut

    def _pass(self, block: nn.Module, i: int, acts: Acts) -> None:
        """Move ``acts`` past a block as it is."""
        self._advance(block, i, acts, (), lambda s, b, x: None, lambda s: None)

    @contextmanager
    def _beside(
        self, block: nn.Module | None, i: int, acts: Acts, stages: Sequence[Sequence[str]]
    ) -> Iterator[Callable[[int, int], Tensor]]:
        """Run ``block``, as it was before it is quantized, over ``acts.original``: gives ``seen(stage, batch)`` and
        moves them past it in the end. Without a block nothing is run.
        """
        if block is None or acts.original is None:
            yield lambda stage, batch: torch.empty(0)
            return
        forwards, cut = self._forwards(block, i, acts.original)
        with Beside(block, stages, forwards, self.waiting, cut).running() as it:

            def seen(stage: int, batch: int) -> Tensor:
                with self._precision():
                    return it.seen(stage, batch)

            yield seen
            if not self.plan.transforms:
                with self._precision():
                    for batch, out in it.outputs():
                        acts.original[batch] = out
        if self.plan.transforms:  # folded maps change the last bits; a resumed run must see the same
            self._pass(self.source.block(i), i, acts.original)

    def _call(self, block: nn.Module, i: int, x: Tensor) -> Tensor:
        out = block(x, **self.source.block_kwargs(x.shape[1])[i])
        return out[0] if isinstance(out, tuple) else out

    def _tune(self, block: nn.Module, i: int, acts: Acts, solved: dict[str, Quantized], before: nn.Module) -> Event:
        """Refine ``solved``, in place and in ``block``; ``acts`` are still the block's inputs, ``acts.original`` the
        outputs of the original block.
        """
        assert self.plan.tune is not None and acts.original is not None
        precision, how, n = PRECISIONS[self.plan.compute], self.plan.tune, self.source.n_blocks

        def tell(step: int) -> None:
            self.tell({"event": "tuning", "block": i, "blocks": n, "step": step, "steps": how.steps})

        found, was, now = tune(
            block,
            lambda x: self._call(block, i, x),
            solved,
            {local: get_weight(before.get_submodule(local)) for local in solved},
            Rows(acts.rows, acts.take, acts.original.take),
            how,
            Products(precision.differentiable, precision.sums.cross_, precision.observed),
            self.plan.seed + i,
            tell,
        )
        for local, q in found.items():
            self._set(block.get_submodule(local), q)
        solved |= found
        return {"event": "tune", "block": i, "before": was, "after": now}

    @contextmanager
    def _precision(self) -> Iterator[None]:
        with torch.no_grad(), PRECISIONS[self.plan.compute].context():
            yield

    def _surely(self, tokens: int) -> bool:
        """Whether the number of threads changes no linear layer's product of ``tokens`` rows."""
        return PRECISIONS[self.plan.compute].steady and tokens >= fixed.FEWEST

    def _steady(self, block: nn.Module, i: int, hidden: Tensor) -> bool:
        """Whether everything that few rows are multiplied by is ours: no expert's share of them, no mask."""
        tokens = hidden.shape[1]
        masked = self.source.block_kwargs(tokens)[i].get("attention_mask") is not None
        return self._surely(tokens) and not (masked or routed(block))

    def _mixings(
        self,
        block: nn.Module,
        stages: Sequence[Sequence[str]],
        needs: Mapping[int, frozenset[str]],
        also: str = "mixed",
    ) -> dict[int, Mixing]:
        """By stage: what attention makes of the input that the layer of its values reads, where ``mixed`` and ``also``
        are needed of it.
        """
        values = self.source.family.values
        asked = [s for s, names in enumerate(stages) if values in names and {"mixed", also} <= needs[s]]
        return {stage: Mixing(block, values) for stage in asked}

    def _observe(
        self,
        stats: dict[int, Stats],
        stage: int,
        x: Tensor,
        needs: frozenset[str],
        original: Tensor | None = None,
        mixing: Mixing | None = None,
        beside: Mixing | None = None,
    ) -> None:
        """``mixing`` and ``beside`` are how attention mixes ``x`` and ``original``."""
        if stage not in stats:
            stats[stage] = Stats.empty(x.shape[-1], needs)
        precision = PRECISIONS[self.plan.compute]

        def mixed(x: Tensor | None, mixing: Mixing | None) -> Tensor | None:
            if x is None or mixing is None:
                return None
            with self._precision():
                found = mixing(x, self.steady)
            return None if found is None else found.to(precision.observed)

        stats[stage].update(
            x.to(precision.observed), precision.sums, original, mixed(x, mixing), mixed(original, beside)
        )

    def _transform(self, block: nn.Module, i: int, acts: Acts, recipes: Mapping[str, Recipe]) -> None:
        """Fit every transform at every site to the original block's statistics, then fold all of them in."""
        if not self.plan.transforms:
            return
        stages = self.source.stages(block)
        stats: dict[int, Stats] = {}

        def observe(stage: int, batch: int, x: Tensor) -> None:
            self._observe(stats, stage, x, frozenset().union(*(t.needs for t in self.plan.transforms)))

        self._advance(block, i, acts, stages, observe, lambda s: None, keep=False)
        self._fit(block, recipes, stats)

    def _fit(self, block: nn.Module, recipes: Mapping[str, Recipe], stats: dict[int, Stats]) -> None:
        """Fit every transform to the statistics of the inputs, fold it in, and carry the statistics along."""
        where = {name: s for s, stage in enumerate(self.source.stages(block)) for name in stage}
        for transform in self.plan.transforms:
            fitted: list[tuple[Site, Tensor]] = []
            for site in self.source.sites(block):
                if not transform.takes(site.kind):
                    continue
                readers = [n for n in site.consumers if n in recipes and where[n] in stats]
                if readers:
                    weights = [(get_weight(block.get_submodule(n)), stats[where[n]]) for n in readers]
                    share = site.expand(torch.arange(site.size(block)))
                    fitted.append((site, site.reduce(transform.fit(weights, recipes[readers[0]].grid, share).s)))
            for site, s in fitted:
                fold(block, site, s)
                for stage in {where[n] for n in site.consumers if n in where} & set(stats):
                    stats[stage] = Diagonal(site.expand(s)).stats(stats[stage])


def needed(recipes: Iterable[Recipe]) -> frozenset[str]:
    """What layers that read one input must know of it."""
    return frozenset().union(*(r.needs for r in recipes)) - {"fisher"}


@contextmanager
def watched(mixings: Mapping[int, Mixing]) -> Iterator[None]:
    """While entered, forward passes tell each of ``mixings`` what else its attention is given."""
    with ExitStack() as stack:
        for mixing in mixings.values():
            stack.enter_context(mixing.watched())
        yield


def settled(block: nn.Module, recipes: Mapping[str, Recipe], ties: Sequence[Sequence[str]]) -> dict[str, Recipe]:
    """``recipes`` with what several weights share settled, before any of them is solved.

    Members of a tie that have one grid settle it together; every other weight does so alone.
    """
    parties: list[list[str]] = []
    for tie in ties:
        grids = dict.fromkeys(recipes[n].grid for n in tie if n in recipes)
        parties += [[n for n in tie if n in recipes and recipes[n].grid == grid] for grid in grids]
    parties += [[n] for n in recipes if not any(n in p for p in parties)]
    found: dict[str, Recipe] = {}
    for party in parties:
        grid = tied(recipes[party[0]].grid, [get_weight(block.get_submodule(n)) for n in party])
        found |= {n: replace(recipes[n], grid=grid) for n in party}
    return found


def solve_one(w: Tensor, recipe: Recipe, stats: Stats | None, layout: Layout) -> tuple[Quantized, Event]:
    """Quantize one weight. A layer that no token reached (an expert never routed to) is rounded to nearest, and says
    so. Bits are those that ``layout`` will store.
    """
    w = w.float().contiguous()
    starved = bool(recipe.solver.needs - {"fisher"}) and (stats is None or not bool((stats.gram.diagonal() > 0).any()))
    solver = Nearest() if starved else recipe.solver
    if stats is not None and not stats.finite():
        raise FewbitsError("activations are not finite during calibration; try --compute fp32, or check the model")
    q = (
        solver(w, recipe.grid, stats)
        if starved or recipe.split is None
        else solver(w, recipe.grid, stats, recipe.split)
    )
    q = replace(q, pruned=q.pruned and pruned.stored_by(layout))
    event: Event = {"bits_per_weight": q.bits_per_weight(), "shape": list(q.shape)} | dict(q.meta)
    if isinstance(q.residual, Sparse):
        event["kept"] = len(q.residual.values) / w.numel()
    if stats is not None and stats.count and not starved:
        error = q.dense().sub_(w)
        energy = float(loss(w, stats.gram))
        event["error"] = (max(0.0, float(loss(error, stats.gram))) / energy) ** 0.5 if energy > 0 else 0.0
        event["tokens"] = stats.count
    else:
        event["error"] = float(_norm(q.dense().sub_(w)) / _norm(w).clamp(min=1e-30))
    if starved:
        event["fallback"] = "no token reached this layer: rounded to nearest"
    elif q.meta.get("damp", 0) > getattr(recipe.solver, "damp", 0) or q.meta.get("float64"):
        event["fallback"] = (
            f"gram matrix nearly singular: float64 {bool(q.meta['float64'])}, damping {q.meta['damp']:g}"
        )
    return q, event


def inputs_of(recipe: Recipe, stats: Stats | None, dtype: torch.dtype, name: str) -> Inputs | None:
    """The scheme of a layer's inputs with its static scale, rounded to the ``dtype`` in which it is stored."""
    scheme = recipe.activations
    if scheme is None or scheme.dynamic:
        return None if scheme is None else Inputs(scheme)
    if stats is None or stats.absmax is None or not stats.count:
        raise FewbitsError(
            f"{name}: no token reached this layer, so its inputs have no static scale; give more --samples, or dynamic "
            "activations"
        )
    return Inputs(scheme, static_scale(scheme, stats.absmax, stats.histogram).to(dtype).float())


def _norm(w: Tensor) -> Tensor:
    return w.square().sum(1).sum().sqrt()


def round_to(block: nn.Module, dtype: torch.dtype, quantized: set[str]) -> None:
    """Round what stays dense to the dtype in which it is stored: later blocks must see what a reader will see."""
    skip = {f"{name}.weight" for name in quantized}
    for name, p in block.named_parameters():
        if name not in skip:
            p.data.copy_(p.data.to(dtype))


def entries_of(source: Source, recipes: Mapping[str, Recipe | None] | None = None) -> list[Entry]:
    """Every linear weight of the blocks as the layouts see it, from headers alone; and the output head, where
    ``recipes`` have it.
    """
    found = []

    def add(name: str, shape: tuple[int, int]) -> None:
        recipe = recipes[name] if recipes else None
        scattered = bool(recipe) and getattr(recipe.solver, "scatters", False)  # type: ignore[union-attr]
        grid, scheme = (recipe.grid, recipe.activations) if recipe else (None, None)
        residual = Sparse.__name__ if recipe and recipe.split else None
        found.append(Entry(name, shape, grid, scattered, residual, scheme))

    for i in range(source.n_blocks):
        block = source.skeleton(i)
        for local, module in source.linears(block).items():
            out, columns = get_weight(module).shape
            add(source.disk_name(i, local), (int(out), int(columns)))
    if recipes and source.head_name in recipes:
        add(source.head_name, source.head_shape)
    return found
