"""Each part of the network against its formula in fp64, or against transformers."""

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from dense_attention import dense
from small_models import packed, random_documents, small_config
from torch import Tensor, nn
from transformers import GptOssConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.models.whisper.modeling_whisper import sinusoids

from triplane.model import head as head_module
from triplane.model.batch import IGNORED_TARGET, Batch
from triplane.model.block import Block
from triplane.model.config import ModelConfig
from triplane.model.head import Head
from triplane.model.parts.activations import Activation
from triplane.model.parts.alibi import Alibi, alibi_slopes
from triplane.model.parts.fix_norm import FixNorm
from triplane.model.parts.gated import Gated
from triplane.model.parts.layer_norm import LayerNorm
from triplane.model.parts.learned import LearnedPositions
from triplane.model.parts.norm import Norm
from triplane.model.parts.plain import Plain
from triplane.model.parts.relative import RelativePositions
from triplane.model.parts.rms import RmsNorm
from triplane.model.parts.rotary import Rotary
from triplane.model.parts.scale_norm import ScaleNorm
from triplane.model.parts.sinusoidal import SinusoidalPositions
from triplane.model.rule import Rule
from triplane.model.weights import Axis

DIM = 12
Weights = dict[str, Tensor]


def filled(module: nn.Module, seed: int = 1) -> Weights:
    """Draws all weights of a module; returns them in fp64."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.5, 0.7, generator=generator)
    return {name: parameter.detach().double() for name, parameter in module.named_parameters()}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def centred(x: Tensor) -> Tensor:
    return x - x.sum(-1, keepdim=True) / x.shape[-1]


def standard(x: Tensor, eps: float) -> Tensor:
    return centred(x) / ((centred(x) ** 2).sum(-1, keepdim=True) / x.shape[-1] + eps) ** 0.5


def root_mean(x: Tensor, eps: float) -> Tensor:
    return x / ((x**2).sum(-1, keepdim=True) / x.shape[-1] + eps) ** 0.5


def length(x: Tensor) -> Tensor:
    return (x**2).sum(-1, keepdim=True) ** 0.5


NORMS: dict[str, tuple[Norm, Callable[[Tensor, Weights], Tensor]]] = {
    "rms": (RmsNorm(eps=0.1), lambda x, w: root_mean(x, 0.1) * w["weight"]),
    "rms, unit offset": (RmsNorm(unit_offset=True), lambda x, w: root_mean(x, 1e-5) * (1 + w["weight"])),
    "layer": (LayerNorm(eps=0.1), lambda x, w: standard(x, 0.1) * w["weight"] + w["bias"]),
    "layer, no bias": (LayerNorm(bias=False), lambda x, w: standard(x, 1e-5) * w["weight"]),
    "layer, no weights": (LayerNorm(gain=False, bias=False), lambda x, w: standard(x, 1e-5)),
    "layer, unit offset": (
        LayerNorm(unit_offset=True),
        lambda x, w: standard(x, 1e-5) * (1 + w["weight"]) + w["bias"],
    ),
    "scale": (ScaleNorm(), lambda x, w: w["weight"] * x / length(x)),
    "fix": (FixNorm(length=3.0), lambda x, w: 3 * x / length(x)),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str) -> None:
    config, formula = NORMS[name]
    norm = config.build(Axis("dim", DIM))
    weights, x = filled(norm), 2 + 3 * drawn(5, DIM)
    expected = formula(x.double(), weights)
    torch.testing.assert_close(norm(x).double(), expected, atol=2e-6, rtol=2e-6)
    norm.mean = lambda part: part.mean(-1, keepdim=True)  # the form over split dims
    torch.testing.assert_close(norm(x).double(), expected, atol=2e-6, rtol=2e-6)
    rounded = norm.bfloat16()(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.double(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_a_zero_vector_have_finite_values_and_gradients(name: str) -> None:
    norm = NORMS[name][0].build(Axis("dim", DIM))
    filled(norm)
    x = torch.zeros(2, DIM, requires_grad=True)
    out = norm(x)
    out.sum().backward()
    assert x.grad is not None and out.isfinite().all() and x.grad.isfinite().all()


def test_the_initial_norm_is_plain() -> None:
    for config, _ in NORMS.values():
        (stream,) = axes = (Axis("dim", DIM),)
        initial = {weight.name: weight.init for weight in config.weights(*axes)}
        offset = getattr(config, "unit_offset", False)
        gain = DIM**0.5 if isinstance(config, ScaleNorm) else 0.0 if offset else 1.0
        assert initial == {name: {"weight": gain, "bias": 0.0}[name] for name in initial}, (config, stream)


FRACTIONS = [1.0, 0.5, 0.25]


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_turns_pairs_as_complex_numbers(fraction: float, interleaved: bool) -> None:
    config = Rotary(base=500.0, fraction=fraction, interleaved=interleaved)
    x_THK, positions_T = drawn(7, 3, 16), torch.tensor([0, 1, 2, 0, 1, 50, 51])
    module = config.build(DIM, 3, 16)
    ours = config.rotate(x_THK, config.tables(module, positions_T, 7))
    turning = int(16 * fraction)
    expected = x_THK.double().clone()
    for pair in range(turning // 2):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + turning // 2)
        angle = positions_T.double() * 500.0 ** (-2 * pair / turning)
        turned = (
            torch.complex(expected[..., first], expected[..., second])
            * torch.polar(torch.ones(7).double(), angle)[:, None]
        )
        expected[..., first], expected[..., second] = turned.real, turned.imag
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=0)


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 3.0},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_seq_len": 128},
    "yarn": {"factor": 4.0, "original_seq_len": 64},
    "yarn, gpt-oss": {"factor": 32.0, "original_seq_len": 4096, "truncate": False},
    "yarn, own factor": {"factor": 8.0, "original_seq_len": 256, "attention_factor": 1.3, "beta_fast": 16.0},
}


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_rotary_is_that_of_transformers(name: str, fraction: float) -> None:
    kind, options = name.partition(",")[0], SCALINGS[name]
    config = Rotary.model_validate(
        {"base": 150_000.0, "fraction": fraction, "scaling": {"kind": kind, **options}}, strict=True
    )
    theirs = {"rope_type": kind, "rope_theta": 150_000.0, "partial_rotary_factor": fraction, **options}
    if before := theirs.pop("original_seq_len", None):
        theirs["original_max_position_embeddings"] = before
    llama = LlamaConfig(
        head_dim=64, max_position_embeddings=int(options["factor"] * (before or 64)), rope_parameters=theirs
    )
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[kind](llama, torch.device("cpu"))
    positions_T = torch.arange(9)
    torch.testing.assert_close(config.frequencies(64, positions_T), frequencies, atol=0, rtol=1e-6)
    cos, sin = config.tables(config.build(DIM, 2, 64), positions_T, 9)
    torch.testing.assert_close(cos[:, 0], (positions_T[:, None] * frequencies).cos() * magnitude)
    torch.testing.assert_close(sin[:, 0], (positions_T[:, None] * frequencies).sin() * magnitude)


def test_sinusoidal_positions() -> None:
    x_TD, positions_T = drawn(5, DIM), torch.tensor([0, 1, 2, 0, 1])
    paper = torch.empty(3, DIM).double()
    for position in range(3):
        for i in range(DIM // 2):
            angle = position / 10_000 ** (2 * i / DIM)
            paper[position, 2 * i], paper[position, 2 * i + 1] = math.sin(angle), math.cos(angle)
    for interleaved, table in ((True, paper), (False, sinusoids(3, DIM).double())):
        config = SinusoidalPositions(interleaved=interleaved)
        ours = config.embed(config.build(DIM, 2, 6), x_TD, positions_T)
        torch.testing.assert_close(ours.double(), x_TD + table[positions_T], atol=1e-6, rtol=0)


@pytest.mark.parametrize("offset", [0, 2])
def test_learned_positions_restart_in_each_document(offset: int) -> None:
    config = LearnedPositions(max_seq_len=5, offset=offset)
    module = config.build(DIM, 2, 6)
    table = filled(module)["weight"]
    assert table.shape == (5 + offset, DIM)
    batch = packed(random_documents(small_config(), [2, 5, 1]))
    x_TD = drawn(8, DIM)
    rows = torch.tensor([0, 1, 0, 1, 2, 3, 4, 0]) + offset
    ours = config.embed(module, x_TD, batch.positions_T)
    torch.testing.assert_close(ours.double(), x_TD + table[rows], atol=1e-6, rtol=0)


SLOPES = {
    4: [2**-2, 2**-4, 2**-6, 2**-8],
    6: [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3],
    12: [2 ** -(i / 2) for i in (2, 4, 6, 8, 10, 12, 14, 16, 1, 3, 5, 7)],
}


@pytest.mark.parametrize("n_heads", SLOPES)
def test_alibi_slopes(n_heads: int) -> None:
    """Beyond a power of two, the next power's: every second from the second on, then from the first on."""
    assert alibi_slopes(n_heads, 8.0) == pytest.approx(SLOPES[n_heads])
    assert alibi_slopes(n_heads, 8.0) == pytest.approx(_get_alibi_slopes(n_heads, torch.device("cpu")).tolist())
    module = Alibi().build(DIM, n_heads, 6)
    module.heads = slice(1, 3)  # a rank's own
    bias = Alibi().bias(Alibi().tables(module, torch.arange(9), 9))
    expected = [[-slope * distance for distance in range(9)] for slope in SLOPES[n_heads][1:3]]
    torch.testing.assert_close(bias, torch.tensor(expected))


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 32), (7, 20), (2, 9)])
def test_relative_buckets_are_t5s(buckets: int, max_distance: int) -> None:
    config = RelativePositions(buckets=buckets, max_distance=max_distance)
    module = config.build(DIM, 3, 4)
    table_HB = filled(module)["weight"]
    theirs = T5Attention._relative_position_bucket(
        -torch.arange(300), bidirectional=False, num_buckets=buckets, max_distance=max_distance
    )
    bias = config.bias(config.tables(module, torch.arange(300), 300))
    assert bias is not None
    assert torch.equal(bias.double(), table_HB[:, theirs])


def test_a_clamped_gate_is_that_of_gpt_oss() -> None:
    config = Gated(hidden_dim=20, activation="gelu_sigmoid", bias=True, clamp=7.0, up_offset=1.0)
    module = config.build(DIM)
    filled(module)
    batch = Batch.build(torch.zeros(50), torch.zeros(50), (0, 50))
    experts = GptOssExperts(GptOssConfig(hidden_size=DIM, intermediate_size=20, num_local_experts=1))
    x_TD = 4 * drawn(50, DIM)
    with torch.no_grad():
        gate, up = module.w_gate(x_TD), module.w_up(x_TD)
        assert (gate > 7).any() and (gate < -7).any() and (up > 7).any() and (up < -7).any()
        theirs = module.w_down(experts._apply_gate(torch.stack((gate, up), dim=-1).flatten(-2)))
        torch.testing.assert_close(module(x_TD, batch), theirs)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: (x + x.abs()) / 2,
    "relu_squared": lambda x: ((x + x.abs()) / 2) ** 2,
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "gelu_tanh": lambda x: x * (1 + ((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh()) / 2,
    "gelu_sigmoid": lambda x: x * sigmoid(1.702 * x),
    "silu": lambda x: x * sigmoid(x),
    "sigmoid": sigmoid,
    "none": lambda x: x,
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", get_args(Activation))
def test_feed_forward(name: Activation, bias: bool) -> None:
    plain = Plain(hidden_dim=20, activation=name, bias=bias).build(DIM)
    gated = Gated(hidden_dim=20, activation=name, bias=bias).build(DIM)
    p, g, x_TD = filled(plain), filled(gated), drawn(5, DIM)

    def linear(w: Weights, layer: str, x: Tensor) -> Tensor:
        return x @ w[f"{layer}.weight"].T + (w[f"{layer}.bias"] if bias else 0)

    act, x = ACTIVATIONS[name], x_TD.double()
    of_plain = linear(p, "w_down", act(linear(p, "w_up", x)))
    of_gated = linear(g, "w_down", act(linear(g, "w_gate", x)) * linear(g, "w_up", x))
    batch = Batch.build(torch.zeros(5), torch.zeros(5), (0, 5))
    torch.testing.assert_close(plain(x_TD, batch).double(), of_plain, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(gated(x_TD, batch).double(), of_gated, atol=1e-4, rtol=1e-5)


H, G, K = 6, 2, 8
LENGTHS = [7, 4]
BLOCKS: dict[str, dict[str, Any]] = {
    "pre": {},
    "rotary": {"positions": {"kind": "rotary"}},
    "post": {"norm_placement": "post"},
    "output": {"norm_placement": "output"},
    "sandwich": {"norm_placement": "sandwich"},
    "parallel": {"residual": "parallel"},
    "parallel, one norm": {"residual": "parallel_shared_norm"},
    "scaled residual": {"residual_scale": 0.3},
    "scaled residual, sandwich": {"residual_scale": 0.3, "norm_placement": "sandwich"},
    "parallel, scaled": {"residual_scale": 0.3, "residual": "parallel"},
    "clip": {"attention": {"clip_qkv": 0.5}},
    "biases": {"attention": {"qkv_bias": True, "output_bias": True}},
    "clipped biases": {"attention": {"qkv_bias": True, "clip_qkv": 0.5, "qk_norm": {}}},
    "window": {"attention": {"window": 3}},
    "scale and cap": {"attention": {"scale": 0.7, "softcap": 2.0}},
    "sinks": {"attention": {"sinks": True}},
}
QK_NORMS: dict[str, dict[str, Any]] = {
    f"qk-norm over {over}{', after rotation' if after else ''}": {
        "positions": {"kind": "rotary"},
        "attention": {"qk_norm": {"kind": kind}, "qk_norm_over": over, "qk_norm_after_rotation": after},
    }
    for over, kind in (("head", "rms"), ("each", "layer"), ("all", "rms"))
    for after in (False, True)
}


def block_config(changes: dict[str, Any]) -> ModelConfig:
    heads = {"n_heads": H, "n_kv_heads": G, "head_dim": K}
    content = {"vocab_size": 20, "dim": 48, "n_layers": 1, "feed_forward": {"kind": "plain", "hidden_dim": 40}}
    return ModelConfig.model_validate(
        content | {"positions": {"kind": "none"}} | changes | {"attention": heads | changes.get("attention", {})}
    )


def by_hand(config: ModelConfig, w: Weights, x_TD: Tensor) -> Tensor:
    """Computes a block over documents of `LENGTHS` in fp64, each formula as its paper has it."""
    attention = config.attention

    def rms(name: str, x: Tensor) -> Tensor:
        return root_mean(x, 1e-5) * w[f"{name}.weight"]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(1).double())

    def turned(x: Tensor) -> Tensor:
        if config.positions.kind == "none":
            return x
        places = torch.tensor([place for n in LENGTHS for place in range(n)]).double()
        angles = places[:, None, None] * 10_000.0 ** (-torch.arange(0, K, 2).double() / K)
        pairs = torch.complex(x[..., : K // 2], x[..., K // 2 :]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    def normed(name: str, x_TNK: Tensor) -> Tensor:
        if attention.qk_norm is None:
            return x_TNK
        gain = w[f"attention.{name}.weight"]
        if attention.qk_norm_over == "head":
            return torch.stack([root_mean(x, 1e-5) * gain for x in x_TNK.unbind(1)], dim=1)
        if attention.qk_norm_over == "each":
            shift = w[f"attention.{name}.bias"]
            return torch.stack([standard(x, 1e-5) * gain[i] + shift[i] for i, x in enumerate(x_TNK.unbind(1))], dim=1)
        return (root_mean(x_TNK.flatten(1), 1e-5) * gain).view_as(x_TNK)

    def attend(x: Tensor) -> Tensor:
        q, k, v = (linear(f"attention.{name}", x) for name in ("wq", "wk", "wv"))
        if attention.clip_qkv is not None:
            q, k, v = (x.clip(-attention.clip_qkv, attention.clip_qkv) for x in (q, k, v))
        q, k, v = q.view(-1, H, K), k.view(-1, G, K), v.view(-1, G, K)
        if attention.qk_norm_after_rotation:
            q, k = normed("q_norm", turned(q)), normed("k_norm", turned(k))
        else:
            q, k = turned(normed("q_norm", q)), turned(normed("k_norm", k))
        rule = Rule(scale=attention.scale or K**-0.5, window=attention.window, softcap=attention.softcap)
        out = dense(q, k, v, [0, 7, 11], rule, sinks_H=w.get("attention.sinks"))
        return config.residual_scale * after("attention", linear("attention.wo", out.flatten(1)))

    def feed(x: Tensor) -> Tensor:
        hidden = ACTIVATIONS["gelu_tanh"](linear("feed_forward.w_up", x))
        return config.residual_scale * after("feed_forward", linear("feed_forward.w_down", hidden))

    def after(branch: str, x: Tensor) -> Tensor:
        return rms(f"{branch}_post_norm", x) if config.norm_placement in ("output", "sandwich") else x

    def before(branch: str, x: Tensor) -> Tensor:
        return rms(f"{branch}_norm", x) if config.norm_placement in ("pre", "sandwich") else x

    x = x_TD.double()
    if config.residual == "parallel":
        return x + attend(before("attention", x)) + feed(before("feed_forward", x))
    if config.residual == "parallel_shared_norm":
        return x + attend(before("attention", x)) + feed(before("attention", x))
    if config.norm_placement == "post":
        x = rms("attention_stream_norm", x + attend(x))
        return rms("feed_forward_stream_norm", x + feed(x))
    x = x + attend(before("attention", x))
    return x + feed(before("feed_forward", x))


@pytest.mark.parametrize("name", [*BLOCKS, *QK_NORMS])
def test_blocks(name: str) -> None:
    config = block_config((BLOCKS | QK_NORMS)[name])
    layer = config.layer(0)
    block = Block(config, layer)
    generator = torch.Generator().manual_seed(2)
    for parameter in block.parameters():
        matrix = parameter.dim() == 2 and parameter.shape[-1] > K
        nn.init.normal_(
            parameter, 0 if matrix else 1, parameter.shape[-1] ** -0.5 if matrix else 0.3, generator=generator
        )
    weights = {name: parameter.detach().double() for name, parameter in block.named_parameters()}
    batch, x_TD = packed(random_documents(config, LENGTHS)), drawn(11, 48)
    kind = config.positions.build(48, H, K)
    assert layer.positions is not None
    tables = layer.positions.tables(kind, batch.positions_T, batch.longest)
    with torch.no_grad():
        ours = block(x_TD, tables, batch)
    torch.testing.assert_close(ours.double(), by_hand(config, weights, x_TD), atol=2e-5, rtol=2e-5)


TARGETS_T = torch.tensor([3, IGNORED_TARGET, 0, 10, 5, 5, 1])
HEADS: dict[str, dict[str, Any]] = {
    "bias": {"head_bias": True},
    "scale": {"head_scale": 0.3},
    "soft cap": {"head_softcap": 1.5},
    "all": {"head_bias": True, "head_scale": 0.3, "head_softcap": 1.5, "z_loss_weight": 1e-2},
}


@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
@pytest.mark.parametrize("name", HEADS)
def test_heads(name: str, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "CHUNK_LOGITS", {"cpu": chunk_tokens * 11})
    config = small_config(vocab_size=11, dim=6, **HEADS[name])
    head = Head(config)
    exact = {key: value.requires_grad_() for key, value in filled(head).items()}
    x_TD = drawn(7, 6).requires_grad_()
    wide_TD = x_TD.detach().double().requires_grad_()
    logits_TV = config.head_scale * (wide_TD @ exact["weight"].T + exact.get("bias", 0))
    if config.head_softcap is not None:
        logits_TV = config.head_softcap * (logits_TV / config.head_softcap).tanh()
    kept = TARGETS_T != IGNORED_TARGET
    partition_T = logits_TV.exp().sum(-1).log()[kept]
    cross_entropy = nn.functional.cross_entropy(logits_TV, TARGETS_T, reduction="sum")
    expected = cross_entropy + config.z_loss_weight * partition_T.square().sum()
    loss = head(x_TD, TARGETS_T)
    torch.testing.assert_close(head(x_TD).double(), logits_TV, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(loss.cross_entropy.double(), cross_entropy)
    torch.testing.assert_close(loss.objective.double(), expected)
    (0.25 * loss.objective).backward()
    (0.25 * expected).backward()
    for ours, theirs in [(x_TD, wide_TD), *((getattr(head, key), exact[key]) for key in exact)]:
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-6, rtol=1e-5)
