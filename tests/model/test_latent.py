"""Multi-head latent attention against its formulas (DeepSeek-V2, section 2.1.2 and 2.1.3) in fp64."""

from typing import Any

import pytest
import torch
from dense_attention import batch_of, dense
from torch import Tensor, nn

from triplane.model.parts.latent import Latent
from triplane.model.parts.rms import RmsNorm
from triplane.model.parts.rotary import Rotary
from triplane.model.rule import Rule

DIM, HEADS, NOPE, ROPE = 24, 3, 6, 4
BOUNDS = [0, 7, 11]
OPTIONS: dict[str, dict[str, Any]] = {
    "compressed queries": {"q_rank": 10},
    "whole queries": {},
    "narrow values": {"v_dim": 3},
    "wide values": {"v_dim": 14, "q_rank": 10},
    "rule": {"window": 3, "softcap": 2.0, "scale": 0.7, "sinks": True, "output_bias": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_latent_attention_is_its_formula(options: dict[str, Any]) -> None:
    sizes = {"n_heads": HEADS, "kv_rank": 9, "nope_dim": NOPE, "rope_dim": ROPE, "v_dim": 8}
    config = Latent.model_validate({**sizes, "norm": RmsNorm(eps=0.1)} | options)
    module, generator = config.build(DIM), torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.0, 0.5, generator=generator)
    assert {weight.name: weight.shape for weight in config.weights(DIM)} == {
        name: tuple(parameter.shape) for name, parameter in module.named_parameters()
    }
    w = {name: parameter.detach().double() for name, parameter in module.named_parameters()}
    positions, batch, x_TD = Rotary(), batch_of(BOUNDS), torch.randn(11, DIM, generator=generator)
    tables = positions.tables(positions.build(DIM, HEADS, ROPE), batch.positions_T, batch.longest)
    ours = module(x_TD, positions, tables, batch)

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T

    def normed(name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * w[f"{name}.weight"]

    def turned(x: Tensor) -> Tensor:
        place = torch.tensor([*range(7), *range(4)])[:, None].double()
        angles = place * 10_000.0 ** (-torch.arange(0, ROPE, 2).double() / ROPE)
        pairs = torch.complex(x[:, : ROPE // 2], x[:, ROPE // 2 :]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    x = x_TD.double()
    c_q = normed("q_norm", linear("w_dq", x)) if config.q_rank else None
    q_all = linear("wq", x) if c_q is None else linear("w_uq", c_q)
    kv_all, turning_key = linear("w_ukv", normed("kv_norm", linear("w_dkv", x))), turned(linear("w_kr", x))
    q, k, v = [], [], []
    for q_head, kv in zip(q_all.chunk(HEADS, dim=1), kv_all.chunk(HEADS, dim=1)):
        q.append(torch.cat((q_head[:, :NOPE], turned(q_head[:, NOPE:])), dim=1))
        k.append(torch.cat((kv[:, :NOPE], turning_key), dim=1))
        v.append(kv[:, NOPE:])
    rule = Rule(scale=config.scale or (NOPE + ROPE) ** -0.5, window=config.window, softcap=config.softcap)
    q_THK, k_THK, v_THV = (torch.stack(parts, dim=1) for parts in (q, k, v))
    out = dense(q_THK, k_THK, v_THV, BOUNDS, rule, sinks_H=w.get("sinks"))
    expected = linear("wo", out.flatten(1)) + w.get("wo.bias", torch.zeros(1).double())
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)
