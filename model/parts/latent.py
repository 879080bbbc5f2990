"""Multi-head latent attention (DeepSeek-V2): keys and values of all heads come from one narrow vector a token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, Self

from pydantic import PositiveInt

from triplane.model.parts.attention import Attention
from triplane.model.parts.positions import Positions, Tables
from triplane.model.parts.rms import RmsNorm
from triplane.model.parts.softmax import AnyNorm
from triplane.model.weights import Axis, Cost, Weight, linear, under

if TYPE_CHECKING:
    from torch import Tensor

    from triplane.model.batch import Batch
    from triplane.model.modules import PartModule


class Latent(Attention):
    """A key is [w_ukv c, turned w_kr x], where c = norm(w_dkv x) and the second part is one for all heads; the value is
    the rest of w_ukv c. A query is w_uq norm(w_dq x), of which the last dims turn."""

    kind: Literal["latent"] = "latent"
    """Multi-head latent attention."""
    q_rank: PositiveInt | None = None
    """Width of the vector from which a token's queries come; 1536 in DeepSeek-V3. None: they come from the stream."""
    kv_rank: PositiveInt
    """Width of the vector from which a token's keys and values come; 512 in DeepSeek-V3."""
    nope_dim: PositiveInt
    """Dims of a query and a key that positions do not see."""
    rope_dim: PositiveInt
    """Dims of a query and a key that positions see; all heads have the same ones in their keys."""
    v_dim: PositiveInt
    """Width of a value."""
    norm: AnyNorm = RmsNorm(eps=1e-6)
    """Norm of the vectors from which queries, and keys and values, come."""

    @property
    def n_kv_heads(self) -> int:
        return self.n_heads

    @property
    def head_dim(self) -> int:
        return max(self.query_dim, self.v_dim)

    @property
    def query_dim(self) -> int:
        return self.nope_dim + self.rope_dim

    @property
    def turning_dim(self) -> int:
        return self.rope_dim

    def weights(self, dim: int) -> Iterator[Weight]:
        yield from self._own_weights(dim)
        for name, axis in self._normed.items():
            yield from under(name, self.norm.weights(axis))

    def cost(self, dim: int, seq_len: int) -> Cost:
        heads, ranks = self.n_heads, tuple(self._normed.values())
        cut = Axis("head", heads, self.v_dim * (self.v_dim < self.head_dim))
        normed = tuple(Axis(axis.name, 20 * axis.count) for axis in ranks)
        return Cost(
            inputs=(Axis("dim", dim), *ranks),
            kept=(*ranks, cut),
            outputs=(Axis("dim", dim), *ranks, Axis("rope", self.rope_dim)),
            attended=(Axis("head", heads, 4 * self.head_dim),),
            statistics=(Axis("head", heads),),
            scores=(Axis("head", heads, (self.query_dim + self.v_dim) * self._seen(seq_len) // 2),),
            moved=(Axis("head", heads, 80 * self.head_dim), *normed),
        )

    def shrunken(self, n_heads: int, head_dim: int) -> Self:
        widths = dict.fromkeys(("nope_dim", "rope_dim", "v_dim", "kv_rank"), head_dim)
        return self.model_copy(update={"n_heads": n_heads, "q_rank": self.q_rank and head_dim, **widths})

    def forward(self, m: PartModule, x_TD: Tensor, positions: Positions, tables: Tables, batch: Batch) -> Tensor:
        import torch
        from torch.nn.functional import pad

        # The projections set the number of heads, since they may hold a share of them.
        q = m.wq(x_TD) if self.q_rank is None else m.w_uq(m.q_norm(m.w_dq(x_TD)))
        q_nope, q_rope = q.view(len(x_TD), -1, self.query_dim).split((self.nope_dim, self.rope_dim), dim=-1)
        kv = m.w_ukv(m.kv_norm(m.w_dkv(x_TD)))
        k_nope, v_THV = kv.view(len(x_TD), -1, self.nope_dim + self.v_dim).split((self.nope_dim, self.v_dim), dim=-1)
        k_rope = positions.rotate(m.w_kr(x_TD)[:, None], tables).expand(-1, k_nope.shape[1], -1)
        q_THK = torch.cat((q_nope, positions.rotate(q_rope, tables)), dim=-1)
        k_THK = torch.cat((k_nope, k_rope), dim=-1)
        # Kernels want queries, keys and values of one width; zeros change neither scores nor values.
        q_THK, k_THK, v_THK = (pad(x, (0, self.head_dim - x.shape[-1])) for x in (q_THK, k_THK, v_THV))
        sinks_H = m.use("sinks") if self.sinks else None
        out_THK = m.core(q_THK, k_THK, v_THK, batch, positions.bias(tables), sinks_H)
        return m.wo(out_THK[..., : self.v_dim].flatten(1))

    def build(self, dim: int) -> PartModule:
        from triplane.model.attend import SegmentAttention
        from triplane.model.modules import PartModule

        module = PartModule(self, self._own_weights(dim))
        for name, axis in self._normed.items():
            setattr(module, name, self.norm.build(axis))
        module.core = SegmentAttention(self.rule())
        return module

    def _own_weights(self, dim: int) -> Iterator[Weight]:
        stream, queries = Axis("dim", dim), Axis("head", self.n_heads, self.query_dim)
        yield from self._sinks()
        if self.q_rank is None:
            yield from linear("wq", queries, stream)
        else:
            yield from linear("w_dq", self._normed["q_norm"], stream)
            yield from linear("w_uq", queries, self._normed["q_norm"])
        yield from linear("w_dkv", self._normed["kv_norm"], stream)
        yield from linear("w_kr", Axis("rope", self.rope_dim), stream)
        yield from linear("w_ukv", Axis("head", self.n_heads, self.nope_dim + self.v_dim), self._normed["kv_norm"])
        values = Axis("head", self.n_heads, self.v_dim)
        yield from linear("wo", stream, values, init="residual", bias=self.output_bias)

    @property
    def _normed(self) -> dict[str, Axis]:
        """The vectors that are normed, by the names of their norms."""
        found = {} if self.q_rank is None else {"q_norm": Axis("q_rank", self.q_rank)}
        return {**found, "kv_norm": Axis("kv_rank", self.kv_rank)}
