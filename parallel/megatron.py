"""The adapter to megatron-core 0.16.1, and its only importer: tensor-parallel layers and pipeline schedules.

megatron-core hard-codes the device "cuda"; `cpu_shim` maps it where there is no CUDA.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from triplane.model.modules import Multiplying
from triplane.parallel.config import ParallelConfig
from triplane.parallel.cpu_shim import serve
from triplane.parallel.mesh import Mesh
from triplane.parallel.stages import group_size
from triplane.parallel.uncompiled import importing_uncompiled

# It warns about each missing accelerator library (apex, Transformer Engine); none is used.
with importing_uncompiled():
    import megatron.core.transformer.multi_token_prediction  # noqa: F401  the schedules import it in their first step
    from megatron.core import parallel_state, tensor_parallel, utils
    from megatron.core.enums import ModelType
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.pipeline_parallel import p2p_communication, schedules
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import layers, mappings
    from megatron.core.tensor_parallel import utils as tensor_parallel_utils

_MODULES_THAT_NAME_CUDA = (p2p_communication, schedules, layers, mappings, tensor_parallel_utils, utils)


def use_groups_of(mesh: Mesh) -> None:
    """Makes megatron-core use the groups of `mesh`; call it once per process.

    Its own set-up creates a group for every axis it knows, over all ranks: thousands, most never used.
    """
    if mesh.device.type != "cuda":
        serve(mesh.device, _MODULES_THAT_NAME_CUDA)
    # The cross-entropy accepts no group and the token gathering no buffer: both look here.
    parallel_state._TENSOR_MODEL_PARALLEL_GROUP = mesh.tp.group
    parallel_state._set_global_memory_buffer()


def _layer_config(dtype: torch.dtype, sequence_parallel: bool) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        # This makes its layers use the default device, which is "meta" while the model is built.
        use_cpu_initialization=True,
        perform_initialization=False,
    )


class _OwnProduct(Multiplying):
    """megatron-core's layers call this with their share of the weight, and communicate before or after it."""

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> Tensor:
        return self.product(input, weight, bias)


class ColumnParallelLinear(_OwnProduct, tensor_parallel.ColumnParallelLinear):  # type: ignore[misc]
    """Holds a share of the output features: (T, in) -> (T, out / tp).

    The input's gradient is a partial sum; the preceding norm sums it over tp, for all its consumers at once.
    """

    def __init__(self, linear: nn.Linear, mesh: Mesh):
        super().__init__(
            linear.in_features,
            linear.out_features,
            config=_layer_config(linear.weight.dtype, sequence_parallel=False),
            init_method=None,
            bias=linear.bias is not None,
            gather_output=False,
            disable_grad_reduce=True,
            tp_group=mesh.tp.group,
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class RowParallelLinear(_OwnProduct, tensor_parallel.RowParallelLinear):  # type: ignore[misc]
    """Holds a share of the input features: (T, in / tp) -> (T, out), summed over tp.

    With sequence parallelism each rank gets its share of the tokens, (T / tp, out).
    """

    def __init__(self, linear: nn.Linear, mesh: Mesh, sequence_parallel: bool):
        super().__init__(
            linear.in_features,
            linear.out_features,
            config=_layer_config(linear.weight.dtype, sequence_parallel),
            init_method=None,
            bias=linear.bias is not None,
            input_is_parallel=True,
            skip_bias_add=True,  # with sequence parallelism it would leave the bias's gradient unsummed
            tp_group=mesh.tp.group,
        )
        self.mesh = mesh

    def forward(self, x: Tensor) -> Tensor:
        out, bias = super().forward(x)
        if bias is None:
            return out
        return out + (copy_to_tp(bias, self.mesh) if self.sequence_parallel else bias)


class VocabParallelEmbedding(tensor_parallel.VocabParallelEmbedding):  # type: ignore[misc]
    """Holds `rows` rows; other ranks' tokens give zero, and the sum over tp is (T, D), or (T / tp, D) per rank."""

    def __init__(self, embedding: nn.Embedding, rows: int, mesh: Mesh, *, sequence_parallel: bool):
        super().__init__(
            rows * mesh.tp.size,
            embedding.embedding_dim,
            init_method=None,
            reduce_scatter_embeddings=sequence_parallel,
            config=_layer_config(embedding.weight.dtype, sequence_parallel),
            tp_group=mesh.tp.group,
        )

    def forward(self, tokens_T: Tensor) -> Tensor:
        # It takes (batch, sequence); with sequence parallelism it returns (sequence, batch, D).
        out = super().forward(tokens_T[None])
        # A copy, since the compiler takes no view of what was summed in place where a block passes it on as it is.
        return out.squeeze(1 if self.reduce_scatter_embeddings else 0).clone()


def copy_to_tp(x: Tensor, mesh: Mesh) -> Tensor:
    """Returns x; sums its gradient over tp."""
    copied = tensor_parallel.copy_to_tensor_model_parallel_region(x, group=mesh.tp.group)
    if copied.requires_grad:
        # Given a non-contiguous gradient, it would sum a copy and pass on the unsummed one.
        copied.register_hook(Tensor.contiguous)
    return copied


def gather_tokens(x_TD: Tensor, mesh: Mesh) -> Tensor:
    """Gathers (T / tp, D) to (T, D); sums its gradient over tp and scatters it."""
    return tensor_parallel.gather_from_sequence_parallel_region(
        x_TD, tensor_parallel_output_grad=True, group=mesh.tp.group
    )


def sum_over_tp(x: Tensor, mesh: Mesh) -> Tensor:
    """Sums x over tp, in place; passes its gradient through."""
    # A non-contiguous x would come back unreduced, silently (mappings.py, _reduce).
    assert x.is_contiguous(), "sum_over_tp needs a contiguous tensor"
    return tensor_parallel.reduce_from_tensor_model_parallel_region(x, group=mesh.tp.group)


def scatter_tokens(x_TD: Tensor, mesh: Mesh) -> Tensor:
    """Sums x over tp and scatters it, (T, D) to (T / tp, D); gathers its gradient."""
    return tensor_parallel.reduce_scatter_to_sequence_parallel_region(x_TD, group=mesh.tp.group)


def vocab_parallel_cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Returns the loss of each token, (T,) fp32, from (T, V / tp) logits. Overwrites fp32 logits."""
    return tensor_parallel.vocab_parallel_cross_entropy(logits_TV, targets_T)


class _Stage(nn.Module):
    """A pipeline stage as the schedules drive it: they set the previous stage's output."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, module: nn.Module, config: ModelParallelConfig, number: int):
        super().__init__()
        self.module = module
        self.config = config
        self.vp_stage = number
        self.received: Tensor | None = None

    def set_input_tensor(self, tensors: list[Tensor | None] | Tensor | None) -> None:
        self.received = tensors[0] if isinstance(tensors, list) else tensors


class Pipeline:
    """This rank's stages, and the schedule that runs micro-batches through the stages of all ranks.

    1F1B (Narayanan et al. 2021, PipeDream-Flush); interleaved if a rank has several stages.
    """

    def __init__(self, stages: list[nn.Module], config: ParallelConfig, mesh: Mesh, *, dtype: torch.dtype, dim: int):
        self.mesh = mesh
        self.interleaved = len(stages) > 1
        self.config = ModelParallelConfig(
            tensor_model_parallel_size=config.tp,
            pipeline_model_parallel_size=config.pp,
            virtual_pipeline_model_parallel_size=len(stages) if self.interleaved else None,
            context_parallel_size=config.cp,
            sequence_parallel=config.sequence_parallel and config.tp > 1,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            # Stages that exchange in both directions mismatch batched sends: without this the interleaved
            # schedule gives wrong losses over two ranks (Megatron-LM#1450).
            overlap_p2p_comm=self.interleaved,
            batch_p2p_comm=not self.interleaved,
            batch_p2p_sync=False,  # True would block the host on the whole device at every send and receive
        )
        # The schedules read these, but ModelParallelConfig lacks them.
        self.config.hidden_size = dim
        self.config.calculate_per_token_loss = True  # the loss is already scaled; the schedule must not divide it again
        self.config.fine_grained_activation_offloading = False
        self.config.mtp_standalone = False
        self.stages = [_Stage(module, self.config, number) for number, module in enumerate(stages)]
        self.groups = ProcessGroupCollection()
        self.groups.tp, self.groups.cp, self.groups.pp = mesh.tp.group, mesh.cp.group, mesh.pp.group
        self.groups.dp_cp = mesh.replicas.group
        self.groups.embd = self.groups.pos_embd = None  # the engine sums tied gradients

    def run(
        self,
        forward: Callable[[nn.Module, int, Tensor | None], Tensor],
        micro_batches: int,
        tokens: int,
        *,
        forward_only: bool,
    ) -> None:
        """Runs `forward(module, i, x_TD)` on every micro-batch i of `tokens` tokens, and its backward.

        `forward` returns the residual stream or, on the last stage, the scaled loss.
        """

        def forward_step(numbers: Iterator[int], stage: _Stage) -> tuple[Tensor, Callable[[Tensor], Any]]:
            # The schedules exchange (sequence, batch, D).
            received = None if stage.received is None else stage.received.squeeze(1)
            out = forward(stage.module, next(numbers), received)
            out = out.unsqueeze(1) if out.dim() == 2 else out
            return out, lambda loss: (loss, torch.zeros((), dtype=torch.int, device=loss.device), None)

        numbers = [iter(range(micro_batches)) for _ in self.stages]
        schedule = schedules.forward_backward_pipelining_without_interleaving
        if self.interleaved:
            schedule = schedules.forward_backward_pipelining_with_interleaving
            self.config.microbatch_group_size_per_vp_stage = group_size(micro_batches, self.mesh.pp.size)
        schedule(
            forward_step_func=forward_step,
            data_iterator=numbers if self.interleaved else numbers[0],
            model=self.stages if self.interleaved else self.stages[0],
            num_microbatches=micro_batches,
            seq_length=tokens,
            micro_batch_size=1,
            forward_only=forward_only,
            p2p_communicator=p2p_communication.P2PCommunicator(self.mesh.pp.group, self.config),
            pg_collection=self.groups,
        )
