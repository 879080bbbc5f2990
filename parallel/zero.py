"""The adapter to DeepSpeed 0.19.8, and its only importer: ZeRO around a module.

Without a pipeline DeepSpeed runs the backward pass, and reduces gradients while it goes on. With one the schedule
does, so gradients add up on the rank and are reduced at the end.
"""

import logging
import os
import types
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from triplane.model.transformer import Transformer
from triplane.parallel.config import BUCKET_ELEMENTS, ParallelConfig
from triplane.parallel.mesh import Mesh
from triplane.parallel.placement import Fragment, LocalModel, Placement, fragments
from triplane.parallel.uncompiled import importing_uncompiled

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
with importing_uncompiled():
    import deepspeed
    import deepspeed.runtime.zero.muon.muon_optimizer  # else imported in the first step
    from deepspeed.ops import __compatible_ops__
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION
    from deepspeed.utils import logger

# It still calls collectives by names that torch 2.13 has deprecated, at every step.
warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed")
logger.setLevel(logging.WARNING)
# Else its CPU start compiles C++ for a minute, fails without a compiler, and a stale lock hangs later runs.
__compatible_ops__["deepspeed_shm_comm"] = False
# Else bf16 with fp32 gradients takes another optimizer at stage 1, which fails when the schedule calls backward.
DeepSpeedEngine._do_optimizer_sanity_check = lambda *_: ZERO_OPTIMIZATION


def materialise_shares(model: Transformer, mesh: Mesh) -> None:
    """ZeRO 3: gives `model` (on meta) its memory, module by module, each cut over dp x cp before the next."""
    _join(mesh)
    dtype = next(model.parameters()).dtype
    for module in model.modules():
        if not list(module.parameters(recurse=False)):
            continue
        if module is model.head and model.config.tie_embeddings and model.embedding is not None:
            model.head.weight = model.embedding.weight
            continue
        module.to_empty(device=mesh.device)
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
        # mem_efficient_linear would replace torch's own F.linear, for everyone.
        deepspeed.zero.Init(module, data_parallel_group=mesh.replicas.group, dtype=dtype, mem_efficient_linear=False)


class ZeroOptimizer:
    """ZeRO (Rajbhandari et al. 2020) over dp x cp; weights and moments are fp32 shares, gradients add up in fp32."""

    def __init__(
        self,
        local: LocalModel,
        optimizer: torch.optim.Optimizer,
        layout: ParallelConfig,
        grad_clip: float,
        mesh: Mesh,
    ):
        self.placements = local.placements
        self.stage = layout.zero
        self.pipelined = mesh.pp.size > 1
        assert not (self.pipelined and self.stage == 3), "ZeRO 3 hangs under a pipeline"
        # It leaves out empty groups, and reduces a norm for each that is left: other stages would wait for ever.
        assert all(group["params"] for group in optimizer.param_groups), "a stage has matrices and vectors"
        for placement in local.placements:
            # What DeepSpeed's norm reads: sharded parameters count on every tp rank, others on the
            # first, and a copy of another stage's parameter never.
            placement.parameter.tensor_model_parallel = placement.sharded  # type: ignore[attr-defined]
            placement.parameter.ds_pipe_replicated = placement.tied_copy  # type: ignore[attr-defined]
            if self.pipelined and self.stage == 2:
                placement.parameter.grad_dtype = torch.float32  # type: ignore[attr-defined]
        _join(mesh)
        on_gpu = mesh.device.type == "cuda"
        # It takes a second bucket, and waits for the device once a backward; a lone replica would gain nothing.
        overlap = on_gpu and mesh.replicas.size > 1 and not self.pipelined
        offload = {"device": "cpu", "pin_memory": on_gpu}  # copies from pageable memory make the host wait
        self.engine, *_ = deepspeed.initialize(
            model=local.module,
            optimizer=optimizer,
            mpu=_mpu(mesh),
            config={
                # Only their product's consistency is checked; the boundary is ours.
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "managed_gradient_accumulation": not self._step_reduces,
                "gradient_clipping": grad_clip,
                "data_types": {"grad_accum_dtype": "fp32"},
                "communication_data_type": "fp32",
                "zero_optimization": {
                    "stage": self.stage,
                    "reduce_bucket_size": min(BUCKET_ELEMENTS, sum(p.local.numel() for p in local.placements)),
                    "overlap_comm": overlap,
                    # Each rank receives the sum of its own share: an all-reduce would send twice as much. Overlapping,
                    # DeepSpeed would wait for the whole device before it sends to each rank.
                    "use_multi_rank_bucket_allreduce": overlap,
                    **({"offload_optimizer": offload} if layout.offload_optimizer else {}),
                },
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,  # its own needs a C++ build; torch's runs on the host too
                # Its search for overflows reads all gradients twice more, waits for each, and after one in an offloaded
                # step finds one in every later step. `_refuse_if_not_finite` stands in.
                "bf16": {"enabled": local.dtype == torch.bfloat16, "check_grad_overflow": False},
                "steps_per_print": None,
                "timers": {"throughput": {"enabled": False}},  # it synchronizes at every micro-batch and step
            },
        )
        self.zero = self.engine.optimizer
        optimizer.register_step_pre_hook(self._refuse_if_not_finite)
        for share in self._shares:
            # Made now and not in the first step, so that a checkpoint can fill it, and so that
            # DeepSpeed, which links the moments once, finds those of every parameter group.
            self.zero.optimizer.state[share] = {
                "step": torch.zeros((), device=share.device),  # where the fused update wants it
                "exp_avg": torch.zeros_like(share),
                "exp_avg_sq": torch.zeros_like(share),
            }

    @property
    def module(self) -> nn.Module:
        """What is called in place of the model, so that its backward is seen."""
        module: nn.Module = self.engine
        return module

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradients of `loss`, which came from `module`; `last` if it is the step's last micro-batch."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def accumulation(self) -> AbstractContextManager[None]:
        """Around the backwards of a schedule: gradients stay on the rank until the end."""
        context: AbstractContextManager[None] = nullcontext() if self._step_reduces else self._coalesced()
        return context

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """What has added up on this rank in `accumulation`."""
        gradient = parameter.grad if parameter.grad is not None else parameter.grad_accum  # type: ignore[attr-defined]
        assert isinstance(gradient, Tensor), "every parameter takes part in every step"
        return gradient

    def step(self) -> Tensor:
        """Applies the gradients and clears them; returns their global norm before clipping.

        If that is not finite, nothing is applied.
        """
        before = self.engine.global_steps
        self.engine.step()
        assert self.engine.global_steps == before + 1, "DeepSpeed took this for no step"
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32)

    def fragments(self) -> Iterator[Fragment]:
        """The fp32 state on this rank: each byte is on one rank of dp x cp."""
        for placement in self.placements:
            found = self._share(placement)
            if found is None:
                continue  # on other ranks
            share, begin, size, start = found
            state = self.zero.optimizer.state[share]
            tensors = {"weight": share.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            for kind, tensor in tensors.items():
                yield from fragments(placement, kind, tensor.narrow(0, begin, size), start, primary=True)

    def loaded(self, step: int) -> None:
        """Takes over fragments that were filled with the state after `step` updates: gathers the weights."""
        for share in self._shares:
            self.zero.optimizer.state[share]["step"].fill_(step)
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        self.zero._partition_all_parameters()  # else what is gathered now stays as it is
        for number in range(len(self._shares)):
            self.zero._reassign_or_swap_out_partitioned_parameters(number)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def _refuse_if_not_finite(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Lets the fused update apply nothing if the gradient's norm is not finite; no host waits to learn of it."""
        norm = torch.as_tensor(self.zero._global_grad_norm)
        optimizer.found_inf = (~norm.isfinite()).float().to(self._shares[0].device)  # type: ignore[attr-defined]

    @property
    def _step_reduces(self) -> bool:
        """Whether `step` finds whole gradients on the rank and reduces them; else they are reduced before."""
        return self.pipelined and self.stage == 1

    @property
    def _shares(self) -> list[Tensor]:
        """The flat fp32 weights of this rank, one tensor for each group of parameters."""
        shares: list[Tensor] = (
            self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        )
        return shares

    def _share(self, placement: Placement) -> tuple[Tensor, int, int, int] | None:
        """Where a parameter is: (tensor, begin, size) of its share here, and where that starts in the parameter."""
        parameter: Any = placement.parameter
        if self.stage == 3:
            group, begin, size = self.zero.grad_position[self.zero.get_param_id(parameter)]
            return self._shares[group], begin, size, dist.get_rank(parameter.ds_process_group) * size
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
        return self._shares[mapping.param_group_index], here.start, here.numel, there.start

    def _coalesced(self) -> AbstractContextManager[None]:
        self.engine.set_gradient_accumulation_boundary(True)
        context: AbstractContextManager[None] = self.engine.coalesce_grad_reduction()
        return context


def _join(mesh: Mesh) -> None:
    """Lets DeepSpeed use torch's process groups."""
    # It insists on the variable, whoever started this rank, and takes the device from it.
    os.environ["LOCAL_RANK"] = str(mesh.device.index or 0)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def _mpu(mesh: Mesh) -> types.SimpleNamespace | None:
    """What DeepSpeed asks of a Megatron-style `mpu`; "model parallel" is tp x pp, "data parallel" dp x cp."""
    if mesh.model is None:
        return None
    answers: dict[str, Any] = {}
    axes = {"model": mesh.model, "tensor_model": mesh.tp.group, "pipeline_model": mesh.pp.group}
    for name, group in axes.items():
        answers[f"get_{name}_parallel_group"] = group
        answers[f"get_{name}_parallel_world_size"] = dist.get_world_size(group)
        answers[f"get_{name}_parallel_rank"] = dist.get_rank(group)
    answers["get_data_parallel_group"] = mesh.replicas.group
    answers["get_data_parallel_world_size"] = mesh.replicas.size
    answers["get_data_parallel_rank"] = mesh.replicas.rank
    answers["get_data_parallel_group_ranks"] = dist.get_process_group_ranks(mesh.replicas.group)
    answers["get_tensor_model_parallel_src_rank"] = dist.get_process_group_ranks(mesh.tp.group)[0]
    return types.SimpleNamespace(**{name: lambda answer=answer: answer for name, answer in answers.items()})
