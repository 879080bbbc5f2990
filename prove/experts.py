"""Losses that layers with experts add, biases of their selection and its closest calls, by the formulas."""

from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from triplane.model.modules import PartModule
from triplane.model.parts.balance import SelectionBias, SequenceLoss
from triplane.model.parts.experts import Experts
from triplane.model.transformer import Transformer


class ExpertsOf:
    """The layers with experts of a model; keeps what each reads in a forward pass."""

    def __init__(self, model: Transformer):
        self._parts = [
            part
            for block in model.blocks.values()
            if isinstance(part := block.get_submodule("feed_forward"), PartModule) and isinstance(part.config, Experts)
        ]
        self._read: dict[nn.Module, Tensor] = {}
        self._counts: dict[PartModule, list[int]] = {}
        self.closest_call = inf
        """The least distance so far of the score of a chosen expert or group from that of one that is not."""
        for part in self._parts:
            part.register_forward_pre_hook(self._keep)

    def added_losses(self, seq_len: int) -> Tensor:
        """Returns the sum over layers of their means over tokens."""
        return sum((self._losses(part, seq_len) for part in self._parts), torch.zeros(()))

    def update_biases(self) -> None:
        """Raises the selection bias of experts with fewer tokens than the mean, and lowers that of those with more."""
        for part, counts in self._counts.items():
            config, mean = part.config, sum(counts) / len(counts)
            assert isinstance(config, Experts) and isinstance(config.balance, SelectionBias)
            for expert, count in enumerate(counts):
                part.router.selection_bias[expert] += config.balance.rate * ((count < mean) - (count > mean))

    def _keep(self, part: nn.Module, args: tuple[Any, ...]) -> None:
        self._read[part] = args[0]

    def _losses(self, part: PartModule, seq_len: int) -> Tensor:
        config, x_TD = part.config, self._read[part]
        assert isinstance(config, Experts)
        logits_TE = x_TD @ part.router.weight.T
        if config.router_bias:
            logits_TE = logits_TE + part.router.bias
        z = config.z_loss_weight * logits_TE.exp().sum(-1).log().square().mean()
        positive_TE = logits_TE.exp() if config.router == "softmax" else 1 / (1 + (-logits_TE).exp())
        mean_score = positive_TE / positive_TE.sum(-1, keepdim=True)
        ranked_TE = (positive_TE if config.router == "sigmoid" else mean_score).detach()
        if isinstance(config.balance, SelectionBias):
            ranked_TE = ranked_TE + part.router.selection_bias
            self._counts[part] = _counts(config, ranked_TE)
        self.closest_call = min(self.closest_call, _closest(config, ranked_TE))
        if not isinstance(config.balance, SequenceLoss):
            return z
        losses = []
        for start in range(0, len(x_TD), seq_len):
            one = slice(start, start + seq_len)
            counts = _counts(config, ranked_TE[one])
            frequency = torch.tensor(counts) * config.n_experts / (config.active * seq_len)
            losses.append((frequency * mean_score[one].mean(0)).sum())
        return z + config.balance.weight * torch.stack(losses).mean()


def _closest(config: Experts, ranked_TE: Tensor) -> float:
    """Returns the least distance, over tokens, from a choice to the next best one."""
    best_TG = ranked_TE.view(len(ranked_TE), config.groups, -1).topk(config.group_best if config.groups > 1 else 1)[0]
    groups_TG = best_TG.sum(-1)
    margins = [_margin(groups_TG, config.active_groups)] if config.groups > 1 else []
    if config.groups > 1:
        kept_TG = groups_TG >= groups_TG.topk(config.active_groups)[0][:, -1:]
        size = config.n_experts // config.groups
        ranked_TE = ranked_TE.masked_fill(~kept_TG.repeat_interleave(size, 1), -inf)
    return min(*margins, _margin(ranked_TE, config.active), inf)


def _margin(scores_TN: Tensor, chosen: int) -> float:
    """Returns the least distance of the so many best scores of a row from the next one."""
    if chosen == scores_TN.shape[1]:
        return inf
    best_TC = scores_TN.topk(chosen + 1)[0]
    return float((best_TC[:, -2] - best_TC[:, -1]).min())


def _counts(config: Experts, ranked_TE: Tensor) -> list[int]:
    """Returns the tokens of each expert."""
    counts = [0] * config.n_experts
    for scores in ranked_TE.tolist():
        for expert in _best(config, scores):
            counts[expert] += 1
    return counts


def _best(config: Experts, scores: list[float]) -> list[int]:
    """Returns the experts that a token with these scores passes."""
    size = config.n_experts // config.groups
    groups = [range(first, first + size) for first in range(0, config.n_experts, size)]
    if config.groups > 1:
        groups.sort(key=lambda group: -sum(sorted((scores[e] for e in group), reverse=True)[: config.group_best]))
        groups = groups[: config.active_groups]
    return sorted((e for group in groups for e in group), key=lambda e: -scores[e])[: config.active]
