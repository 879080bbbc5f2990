"""The adapter to DeepSpeed 0.19.8, and its only importer: ZeRO around a module whose backward we call.

`managed_gradient_accumulation: False` makes `engine.step()` the boundary: gradients add up in
`parameter.grad` over the micro-batches of any schedule, and one step reduces them over dp, clips by the
norm over dp, tp and pp, updates this rank's fp32 share, and gathers the weights.
"""

import logging
import os
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from triplane.parallel.mesh import Mesh
from triplane.parallel.placement import Fragment, Placement, fragments

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    from deepspeed.ops import __compatible_ops__
    from deepspeed.utils import logger

# It still calls collectives by names that torch 2.13 has deprecated, at every step.
warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed")
logger.setLevel(logging.WARNING)
# Else its CPU start compiles C++ for a minute, fails without a compiler, and a stale lock hangs later runs.
__compatible_ops__["deepspeed_shm_comm"] = False


class ZeroOptimizer:
    """ZeRO stage 1 (Rajbhandari et al. 2020): each dp rank keeps a share of fp32 weights and moments."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        placements: list[Placement],
        grad_clip: float,
        dtype: torch.dtype,
        mesh: Mesh,
    ):
        self.placements = placements
        for placement in placements:
            # What DeepSpeed's norm reads: sharded parameters count on every tp rank, others on the
            # first, and a copy of another stage's parameter never.
            placement.parameter.tensor_model_parallel = placement.sharded  # type: ignore[attr-defined]
            placement.parameter.ds_pipe_replicated = placement.tied_copy  # type: ignore[attr-defined]
        # It insists on the variable, whoever started this rank, and takes the device from it.
        os.environ["LOCAL_RANK"] = str(mesh.device.index or 0)
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            mpu=_mpu(mesh) if mesh.model is not None else None,
            config={
                # Only their product's consistency is checked; the boundary is ours.
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "managed_gradient_accumulation": False,
                "gradient_clipping": grad_clip,
                "zero_optimization": {"stage": 1, "overlap_comm": False},
                "zero_allow_untested_optimizer": True,
                "bf16": {"enabled": dtype == torch.bfloat16},
                "steps_per_print": None,
            },
        )
        self.zero = self.engine.optimizer
        for share in self.zero.single_partition_of_fp32_groups:
            # Made now and not in the first step, so that a checkpoint can fill it, and so that
            # DeepSpeed, which links the moments once, finds those of every parameter group.
            self.zero.optimizer.state[share] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(share),
                "exp_avg_sq": torch.zeros_like(share),
            }

    def step(self) -> Tensor:
        """Applies the gradients in `parameter.grad` and clears them; returns their global norm before clipping."""
        self.engine.step()
        assert not self.zero.overflow, "ZeRO skipped a step"
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32)

    def fragments(self) -> Iterator[Fragment]:
        """The fp32 state on this rank: each byte is on one dp rank."""
        for placement in self.placements:
            mapping: Any = placement.parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                continue  # on other dp ranks
            share = self.zero.single_partition_of_fp32_groups[mapping.param_group_index]
            state = self.zero.optimizer.state[share]
            tensors = {"weight": share.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
            for kind, tensor in tensors.items():
                flat = tensor.narrow(0, here.start, here.numel)
                yield from fragments(placement, kind, flat, there.start, primary=True)

    def loaded(self, step: int) -> None:
        """Takes over fragments that were filled with the state after `step` updates: gathers the weights."""
        for share in self.zero.single_partition_of_fp32_groups:
            self.zero.optimizer.state[share]["step"].fill_(step)
        self.zero.update_lp_params()


def _mpu(mesh: Mesh) -> types.SimpleNamespace:
    """What DeepSpeed asks of a Megatron-style `mpu`; "model parallel" is tp x pp."""
    answers: dict[str, Any] = {}
    axes = {"model": mesh.model, "tensor_model": mesh.tp.group, "pipeline_model": mesh.pp.group}
    for name, group in axes.items():
        answers[f"get_{name}_parallel_group"] = group
        answers[f"get_{name}_parallel_world_size"] = dist.get_world_size(group)
        answers[f"get_{name}_parallel_rank"] = dist.get_rank(group)
    answers["get_data_parallel_group"] = mesh.dp.group
    answers["get_data_parallel_world_size"] = mesh.dp.size
    answers["get_data_parallel_rank"] = mesh.dp.rank
    answers["get_data_parallel_group_ranks"] = dist.get_process_group_ranks(mesh.dp.group)
    answers["get_tensor_model_parallel_src_rank"] = dist.get_process_group_ranks(mesh.tp.group)[0]
    return types.SimpleNamespace(**{name: lambda answer=answer: answer for name, answer in answers.items()})
