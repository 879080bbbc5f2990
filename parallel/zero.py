"""The adapter to DeepSpeed 0.19.8, and its only importer: ZeRO 1 and 2 around a module.

Without a pipeline, DeepSpeed runs the backward pass and reduces gradients during it. With one, the schedule runs it,
so gradients accumulate on the rank and are reduced at the end.
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

from triplane.parallel.config import BUCKET_ELEMENTS, ParallelConfig
from triplane.parallel.mesh import Mesh
from triplane.parallel.placement import Fragment, LocalModel, Placement, fragments
from triplane.parallel.uncompiled import importing_uncompiled
from triplane.parallel.update import OptimizerKind, Piece, set_rate

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
with importing_uncompiled():
    import deepspeed
    import deepspeed.runtime.zero.muon.muon_optimizer  # would be imported in the first step
    from deepspeed.ops import __compatible_ops__
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION
    from deepspeed.utils import logger

# It calls collectives by names that torch 2.13 deprecates, at every step.
warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed")
logger.setLevel(logging.WARNING)
# Otherwise its CPU start compiles C++ for a minute, fails without a compiler, and a stale lock hangs later runs.
__compatible_ops__["deepspeed_shm_comm"] = False
# Otherwise bf16 with fp32 gradients gets another optimizer at stage 1, which fails when the schedule calls backward.
DeepSpeedEngine._do_optimizer_sanity_check = lambda *_: ZERO_OPTIMIZATION


class ZeroOptimizer:
    """ZeRO (Rajbhandari et al. 2020) over dp x cp; weights and moments are fp32 shards, gradients add up in fp32."""

    def __init__(
        self,
        local: LocalModel,
        kind: OptimizerKind,
        layout: ParallelConfig,
        mesh: Mesh,
    ):
        (optimizer,) = kind.build([Piece(placement, placement.parameter) for placement in local.placements], mesh)
        self.placements = local.placements
        self.stage = layout.zero
        self.pipelined = mesh.pp.size > 1
        assert self.stage < 3, "stage 3 is in fully_sharded.py"
        # It drops empty groups and reduces one norm per remaining group: other stages would wait forever.
        assert all(group["params"] for group in optimizer.param_groups), "every stage needs both matrices and vectors"
        for placement in local.placements:
            # DeepSpeed's norm reads these: sharded parameters count on every tp rank, others on the first,
            # and a copy of another stage's parameter never.
            placement.parameter.tensor_model_parallel = placement.sharded  # type: ignore[attr-defined]
            placement.parameter.ds_pipe_replicated = placement.tied_copy  # type: ignore[attr-defined]
            if self.pipelined and self.stage == 2:
                placement.parameter.grad_dtype = torch.float32  # type: ignore[attr-defined]
        _join(mesh)
        on_gpu = mesh.device.type == "cuda"
        # It costs a second bucket and one wait for the device per backward; a lone replica would gain nothing.
        overlap = on_gpu and mesh.replicas.size > 1 and not self.pipelined
        offload = {"device": "cpu", "pin_memory": on_gpu}  # copies from pageable memory block the host
        self.engine, *_ = deepspeed.initialize(
            model=local.module,
            optimizer=optimizer,
            mpu=_mpu(mesh),
            config={
                # DeepSpeed only checks that these are consistent; `backward` sets the boundary.
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "managed_gradient_accumulation": not self._step_reduces,
                "gradient_clipping": kind.grad_clip,
                "data_types": {"grad_accum_dtype": "fp32"},
                "communication_data_type": "fp32",
                "zero_optimization": {
                    "stage": self.stage,
                    "reduce_bucket_size": min(BUCKET_ELEMENTS, sum(p.local.numel() for p in local.placements)),
                    "overlap_comm": overlap,
                    # Without it each rank receives only its own shard's sum, half an all-reduce's traffic; but with
                    # overlap DeepSpeed would then wait for the whole device before each send.
                    "use_multi_rank_bucket_allreduce": overlap,
                    **({"offload_optimizer": offload} if layout.offload_optimizer else {}),
                },
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,  # its own needs a C++ build; torch's runs on the host as well
                # Its overflow check reads all gradients twice more, waits for each, and after one overflow in an
                # offloaded step reports one in every later step. `_refuse` replaces it.
                "bf16": {"enabled": local.dtype == torch.bfloat16, "check_grad_overflow": False},
                "steps_per_print": None,
                "timers": {"throughput": {"enabled": False}},  # would synchronize at every micro-batch and step
            },
        )
        self.zero = self.engine.optimizer
        self._discards = False
        optimizer.register_step_pre_hook(self._refuse)
        for share in self._shares:
            # Created now rather than in the first step, so that a checkpoint can fill it and DeepSpeed, which
            # links the moments once, finds those of every parameter group.
            self.zero.optimizer.state[share] = {
                "step": torch.zeros((), device=share.device),  # the fused update requires it there
                "exp_avg": torch.zeros_like(share),
                "exp_avg_sq": torch.zeros_like(share),
            }

    @property
    def module(self) -> nn.Module:
        """The module to call instead of the model, so that DeepSpeed sees its backward."""
        return self.engine

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulates the gradients of `loss`, which `module` returned; `last` marks the step's last micro-batch."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def accumulation(self) -> AbstractContextManager[None]:
        """Wraps a schedule's backward passes; gradients stay on the rank until its end."""
        return nullcontext() if self._step_reduces else self._coalesced()

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """Returns the gradient accumulated on this rank in `accumulation`."""
        gradient = parameter.grad if parameter.grad is not None else parameter.grad_accum  # type: ignore[attr-defined]
        assert isinstance(gradient, Tensor), "every parameter takes part in every step"
        return gradient

    def step(self, learning_rate: float) -> Tensor:
        """Applies and clears the gradients; returns their global norm before clipping.

        Applies nothing if the norm is not finite.
        """
        set_rate(self.zero.optimizer, learning_rate)
        before = self.engine.global_steps
        self.engine.step()
        assert self.engine.global_steps == before + 1, "DeepSpeed skipped the step"
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32)

    def discard(self) -> Tensor:
        """Clears the gradients; returns their global norm."""
        self._discards = True
        norm = self.step(0.0)
        self._discards = False
        return norm

    def fragments(self) -> Iterator[Fragment]:
        """Yields the fp32 state on this rank; each byte is on one dp x cp rank."""
        for placement in self.placements:
            found = self._share(placement)
            if found is None:
                continue  # on other ranks
            share, begin, size, start = found
            state = self.zero.optimizer.state[share]
            tensors = {"weight": share.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            for kind, tensor in tensors.items():
                yield from fragments(placement, kind, tensor.narrow(0, begin, size), start=start, primary=True)

    def loaded(self, step: int) -> None:
        """Adopts fragments that were filled with the state after `step` updates, and gathers the weights."""
        for share in self._shares:
            self.zero.optimizer.state[share]["step"].fill_(step)
        self.zero.update_lp_params()

    def _refuse(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Makes the fused update apply nothing if the gradient norm is not finite, without a wait of the host, or if
        the gradients are to be discarded."""
        refused = ~torch.as_tensor(self.zero._global_grad_norm).isfinite() | self._discards
        optimizer.found_inf = refused.float().to(self._shares[0].device)  # type: ignore[attr-defined]

    @property
    def _step_reduces(self) -> bool:
        """Whether `step` reduces the gradients; otherwise they are reduced before it."""
        return self.pipelined and self.stage == 1

    @property
    def _shares(self) -> list[Tensor]:
        """This rank's flat fp32 weights, one tensor per parameter group."""
        shares: list[Tensor] = self.zero.single_partition_of_fp32_groups
        return shares

    def _share(self, placement: Placement) -> tuple[Tensor, int, int, int] | None:
        """Locates a parameter's share: (tensor, begin, size), and where it starts in the parameter."""
        parameter: Any = placement.parameter
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
        return self._shares[mapping.param_group_index], here.start, here.numel, there.start

    def _coalesced(self) -> AbstractContextManager[None]:
        self.engine.set_gradient_accumulation_boundary(True)
        return self.engine.coalesce_grad_reduction()


def _join(mesh: Mesh) -> None:
    """Makes DeepSpeed use torch's process groups."""
    # It requires the variable, whoever started this rank, and takes the device from it.
    os.environ["LOCAL_RANK"] = str(mesh.device.index or 0)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def _mpu(mesh: Mesh) -> types.SimpleNamespace | None:
    """Returns a Megatron-style `mpu` for DeepSpeed; "model parallel" is tp x pp, "data parallel" dp x cp."""
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
