"""Weight decay reaches matrices only."""

import torch
from torch import nn

from triplane.model.weights import Weight
from triplane.training.optimizers.adamw import AdamW, adamw


def test_without_gradient_only_matrices_shrink() -> None:
    module = nn.ModuleDict({"linear": nn.Linear(3, 3, bias=False), "norm": nn.RMSNorm(3)})
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    matrix, vector = Weight("linear", (), "normal", "matrix"), Weight("norm", (), 1.0, "vector")
    described = [(p, matrix if p.dim() > 1 else vector) for p in module.parameters()]
    optimizer = adamw(AdamW(lr=0.5, weight_decay=0.1), described)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(module["linear"].weight.data, before["linear.weight"] * (1 - 0.5 * 0.1))
    torch.testing.assert_close(module["norm"].weight.data, before["norm.weight"])


def test_adam_is_as_configured() -> None:
    config = AdamW(lr=0.1, beta1=0.8, beta2=0.9, eps=1e-3)
    optimizer = adamw(config, ((p, Weight("linear", (), "normal", "matrix")) for p in nn.Linear(2, 2).parameters()))
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.1, (0.8, 0.9), 1e-3)
