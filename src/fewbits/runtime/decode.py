"""Generating one sequence with Llama-like models, a token at a time, without the machinery of ``generate``.

The prompt goes through transformers' own forward pass. After that a token costs one product each for q, k, v together,
for gate and up together, for o and for down; keys and values lie in one tensor made in advance. Every rounding is where
transformers has it, so greedy tokens are those of ``generate``. Models of other families, and generation settings that
change the scores in ways not known here, go to ``generate``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.kernels import qlinear, step
from fewbits.runtime.linear import QuantLinear

FAMILIES = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
ROPES = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary embeddings whose angles do not depend on the length of the sequence."""

# Settings that leave the scores alone, with the values at which they do, besides None.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "guidance_scale": (1.0,),
    "renormalize_logits": (False,),
    "remove_invalid_values": (False,),
} | dict.fromkeys(
    (
        "min_p",
        "top_h",
        "bad_words_ids",
        "suppress_tokens",
        "begin_suppress_tokens",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "exponential_decay_length_penalty",
        "sequence_bias",
        "watermarking_config",
        "stop_strings",
        "max_time",
    ),
    (),
)
TOP_K = 50
"""Tokens that transformers samples from when a model's settings name no number."""

Step = Callable[[Tensor], Tensor]


def generate(
    model: Any, ids: Tensor, max_tokens: int, temperature: float = 0.0, streamer: Any = None, cache: Any = None
) -> list[int]:
    """Up to ``max_tokens`` new token ids after the prompt ``ids`` int64 ``[1, T]``; ends after an end-of-text token.

    ``temperature`` 0 takes the likeliest token; above it, sampling draws from torch's global generator as transformers
    does. ``streamer`` has ``put`` and ``end`` as transformers' streamers have. ``cache`` is an empty Cache of
    transformers to use, such as :class:`fewbits.runtime.kvcache.QuantizedCache`.
    """
    if cache is None and supports(model, ids.shape[1] + max_tokens) and len(ids) == 1:
        return Decoder(model).run(ids, max_tokens, temperature, streamer)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    settings, ends = model.generation_config, _ends(model)
    pad = settings.pad_token_id if settings.pad_token_id is not None else next(iter(sorted(ends)), 0)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        streamer=streamer,
        pad_token_id=pad,
        past_key_values=cache,
        **sampling,
    )
    return [int(i) for i in out[0, ids.shape[1] :]]


def supports(model: Any, length: int) -> bool:
    """Whether :class:`Decoder` gives what transformers would for sequences of ``length`` tokens."""
    settings = getattr(model, "generation_config", None)
    if type(model).__name__ not in FAMILIES or settings is None or model.training:
        return False
    kinds = {(p.device.type, p.dtype) for p in model.parameters()}
    if kinds != {("cpu", model.dtype)} or model.dtype not in qlinear.DTYPES:
        return False
    plain = all(getattr(settings, n, None) is None or getattr(settings, n) in v for n, v in NEUTRAL.items())
    window = getattr(model.config, "sliding_window", None)
    rope = getattr(model.model.rotary_emb, "rope_type", None)
    return plain and rope in ROPES and (not window or length <= window) and model.config._attn_implementation == "sdpa"


class Decoder:
    """The weights of ``model`` as decoding reads them. Change the model, and make a new one.

    Quantized layers that read the same input are stacked; the layers of ``model`` become views of the stack, so that
    nothing is held twice.
    """

    def __init__(self, model: Any):
        self.model, self.dtype = model, model.dtype
        with torch.inference_mode():
            self.layers = [_Layer.of(m, self.dtype) for m in model.model.layers]
            self.norm = _norm(model.model.norm)
            self.head = _product([model.lm_head], self.dtype)

    def run(self, ids: Tensor, max_tokens: int, temperature: float = 0.0, streamer: Any = None) -> list[int]:
        """See :func:`generate`."""
        found: list[int] = []
        _tell(streamer, ids)
        for token in self.tokens(ids, max_tokens, temperature):
            found.append(token)
            _tell(streamer, torch.tensor([token]))
        if streamer is not None:
            streamer.end()
        return found

    def tokens(self, ids: Tensor, max_tokens: int, temperature: float = 0.0) -> Iterator[int]:
        """The same, one by one."""
        choose, ends = _chooser(self.model.generation_config, temperature), _ends(self.model)
        prompt = ids.shape[1]
        with torch.inference_mode():
            logits, cache = self._prompt(ids, prompt + max_tokens)
            cos, signed = self._angles(prompt + max_tokens)
            token = choose(logits)
        for n in range(prompt, prompt + max_tokens):
            yield token
            if token in ends or n + 1 == prompt + max_tokens:
                return
            with torch.inference_mode():
                token = choose(self._step(token, n, cache, (cos[n], signed[n])))

    def _prompt(self, ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Scores ``[1, vocabulary]`` after the prompt, and room for ``[layers, 2, 1, heads, length, head size]``."""
        out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        held = out.past_key_values.layers
        _, heads, prompt, size = held[0].keys.shape
        cache = torch.empty(len(held), 2, 1, heads, length, size, dtype=self.dtype)
        for layer, old in zip(cache, held, strict=True):
            layer[0, :, :, :prompt], layer[1, :, :, :prompt] = old.keys, old.values
        return out.logits[:, -1], cache

    def _angles(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines, and sines with the sign of ``rotate_half``: ``[length, head size]``."""
        like = torch.empty(0, dtype=self.dtype)
        cos, sin = self.model.model.rotary_emb(like, torch.arange(length)[None])
        sin = sin[0].clone()
        sin[:, : sin.shape[1] // 2].neg_()
        return cos[0].contiguous(), sin

    def _step(self, token: int, n: int, cache: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Scores after ``token`` at position ``n``, whose keys and values join the cache."""
        h = F.embedding(torch.tensor([token]), self.model.model.embed_tokens.weight)
        for layer, held in zip(self.layers, cache, strict=True):
            h = layer(h, n, held, angles)
        return self.head(self.norm(h))


@dataclass(frozen=True)
class _Layer:
    norm: Step
    qkv: Step
    q_norm: Step | None
    k_norm: Step | None
    scale: float
    size: int
    o: Step
    mlp_norm: Step
    gate_up: Step
    act: Step
    down: Step

    @classmethod
    def of(cls, m: Any, dtype: torch.dtype) -> _Layer:
        a, mlp = m.self_attn, m.mlp
        return cls(
            _norm(m.input_layernorm),
            _product([a.q_proj, a.k_proj, a.v_proj], dtype),
            _norm(a.q_norm) if hasattr(a, "q_norm") else None,
            _norm(a.k_norm) if hasattr(a, "k_norm") else None,
            a.scaling,
            a.head_dim,
            _product([a.o_proj], dtype),
            _norm(m.post_attention_layernorm),
            _product([mlp.gate_proj, mlp.up_proj], dtype),
            F.silu if isinstance(mlp.act_fn, nn.SiLU) or type(mlp.act_fn).__name__ == "SiLUActivation" else mlp.act_fn,
            _product([mlp.down_proj], dtype),
        )

    def __call__(self, h: Tensor, n: int, cache: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """``h [1, hidden]`` at position ``n``; ``cache [2, 1, heads, length, head size]``."""
        rows = self.qkv(self.norm(h)).view(-1, self.size)
        held = cache.shape[2]
        queries = len(rows) - 2 * held
        turned = rows[: queries + held]
        if self.q_norm is not None and self.k_norm is not None:
            turned[:queries], turned[queries:] = self.q_norm(turned[:queries]), self.k_norm(turned[queries:])
        step.rotate(turned, *angles)
        cache.view(2 * held, -1, self.size)[:, n] = rows[queries:]
        seen = cache[:, :, :, : n + 1]
        mixed = F.scaled_dot_product_attention(
            rows[:queries].view(1, queries, 1, -1), seen[0], seen[1], scale=self.scale, enable_gqa=queries != held
        )
        h = h + self.o(mixed.view(1, -1))
        gate, up = self.gate_up(self.mlp_norm(h)).chunk(2, -1)
        return h + self.down(self.act(gate) * up)


def _norm(m: Any) -> Step:
    weight, eps = m.weight.detach(), m.variance_epsilon
    return lambda x: step.rms_norm(x, weight, eps)


def _product(layers: Sequence[nn.Module], dtype: torch.dtype) -> Step:
    """``x [1, in] -> [1, sum of outs]`` of layers that read the same input."""
    stack = _stack(layers)
    if stack is not None:
        packed, bias = stack
        return lambda x: qlinear.matmul(x, packed, bias)
    if len(layers) == 1:
        return _single(layers[0], dtype)
    parts = [_single(m, dtype) for m in layers]
    return lambda x: torch.cat([part(x) for part in parts], -1)


def _single(m: Any, dtype: torch.dtype) -> Step:
    # torch's matrix-vector product reads 16-bit weights at twice the speed of its matrix product.
    if type(m) is not nn.Linear or m.weight.dtype != dtype or dtype == torch.float32:
        return m
    weight, bias = m.weight.detach(), None if m.bias is None else m.bias.detach()
    if bias is None:
        return lambda x: torch.mv(weight, x[0])[None]
    return lambda x: torch.addmv(bias, weight, x[0])[None]


def _stack(layers: Iterable[nn.Module]) -> tuple[qlinear.PackedWeight, Tensor | None] | None:
    """One weight and bias for several quantized layers, which become views of it; None when they do not go together."""
    quantized: list[QuantLinear] = []
    for m in layers:
        if not isinstance(m, QuantLinear) or m._packed is None or m._sparse is not None or m.inputs is not None:
            return None
        quantized.append(m)
    packed = [m._packed for m in quantized if m._packed is not None]
    joined = qlinear.stack(packed)
    if joined is None:
        return None
    whole, parts = joined
    for m, part in zip(quantized, parts, strict=True):
        m._packed = part
    if all(m.bias is None for m in quantized):
        return whole, None
    return whole, torch.cat([torch.zeros(m.out_features) if m.bias is None else m._bias() for m in quantized])


def _chooser(settings: Any, temperature: float) -> Callable[[Tensor], int]:
    """From scores ``[1, vocabulary]`` to a token, in the order of transformers' own processors."""
    if not temperature:
        return lambda scores: int(scores.argmax(-1))
    top_k = TOP_K if settings.top_k is None else settings.top_k
    top_p = 1.0 if settings.top_p is None else settings.top_p

    def choose(scores: Tensor) -> int:
        scores = scores.float() / temperature
        if top_k:
            least = torch.topk(scores, min(top_k, scores.shape[-1]))[0][..., -1, None]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if top_p < 1.0:
            ordered, order = torch.sort(scores, descending=False)
            drop = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
            drop[..., -1:] = False
            scores = scores.masked_fill(drop.scatter(1, order, drop), -torch.inf)
        return int(torch.multinomial(scores.softmax(-1), 1))

    return choose


def _ends(model: Any) -> frozenset[int]:
    ends = model.generation_config.eos_token_id
    return frozenset(ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends])


def _tell(streamer: Any, tokens: Tensor) -> None:
    if streamer is not None:
        streamer.put(tokens)
