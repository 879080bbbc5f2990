"""The adapter to megatron-core 0.16.1, and its only importer: groups, tensor-parallel layers, 1F1B.

megatron-core names the device "cuda" literally. Where there is no CUDA, `_serve_cpu` hands its modules
a view of torch in which "cuda" is the CPU; torch itself is not touched.
"""

import importlib
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from triplane.parallel.mesh import Axis, Mesh

with warnings.catch_warnings():
    # It warns of each accelerator library (apex, Transformer Engine) that is not there; none is used.
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.enums import ModelType
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving

_MODULES_THAT_NAME_CUDA = (
    "pipeline_parallel.p2p_communication",
    "pipeline_parallel.schedules",
    "tensor_parallel.layers",
    "tensor_parallel.mappings",
    "tensor_parallel.utils",
    "utils",
)
_CPU = torch.device("cpu")


class _TorchOnCpu(types.ModuleType):
    """torch, except that the device "cuda" means the CPU."""

    def __init__(self) -> None:
        super().__init__("torch_on_cpu")
        self.cuda = types.ModuleType("cuda_on_cpu")
        self.cuda.__getattr__ = lambda name: getattr(torch.cuda, name)  # type: ignore[method-assign]
        self.cuda.current_device = lambda: _CPU  # type: ignore[attr-defined]
        self.cuda.synchronize = lambda *_: None  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name not in ("empty", "empty_like", "full", "ones", "tensor", "zeros"):
            return value

        def on_cpu(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            named_cuda = device is not None and torch.device(device).type == "cuda"
            made: Tensor = value(*args, device=_CPU if named_cuda else device, **kwargs)
            return made

        return on_cpu


def _serve_cpu() -> None:
    for name in _MODULES_THAT_NAME_CUDA:
        importlib.import_module(f"megatron.core.{name}").torch = _TorchOnCpu()  # type: ignore[attr-defined]


def initialize_mesh(tp: int, pp: int, device: torch.device) -> Mesh:
    """Creates megatron-core's groups over all ranks, in its default order tp, dp, pp."""
    if device.type == "cpu":
        _serve_cpu()
    parallel_state.initialize_model_parallel(tp, pp, create_gloo_process_groups=False)

    def axis(group: dist.ProcessGroup) -> Axis:
        return Axis(group.size(), group.rank(), group)

    embedding = parallel_state.get_embedding_group(check_initialized=False) if pp > 1 else None
    return Mesh(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp=axis(parallel_state.get_tensor_model_parallel_group()),
        pp=axis(parallel_state.get_pipeline_model_parallel_group()),
        dp=axis(parallel_state.get_data_parallel_group()),
        model=parallel_state.get_model_parallel_group(),
        embedding=embedding if parallel_state.is_rank_in_embedding_group() else None,
    )


def _config(dtype: torch.dtype, hidden_size: int = 0) -> ModelParallelConfig:
    config = ModelParallelConfig(
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        # Its layers then take the default device, which is "meta" while the model is built.
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    # The schedules read these, but ModelParallelConfig lacks them.
    config.hidden_size = hidden_size
    config.calculate_per_token_loss = True  # a loss comes scaled; the schedule must not divide it again
    config.fine_grained_activation_offloading = False
    config.mtp_standalone = False
    return config


def _keywords(dtype: torch.dtype, mesh: Mesh) -> dict[str, Any]:
    """What every layer takes; weights are initialised elsewhere."""
    return {"config": _config(dtype), "init_method": None, "tp_group": mesh.tp.group}


class ColumnParallelLinear(tensor_parallel.ColumnParallelLinear):  # type: ignore[misc]
    """Holds a share of the output features: (T, in) whole -> (T, out / tp).

    The input's gradient is a partial sum; the norm before it (`CopyingRMSNorm`) adds up those of all
    its consumers in one all-reduce.
    """

    def __init__(self, linear: nn.Linear, mesh: Mesh):
        super().__init__(
            linear.in_features,
            linear.out_features,
            **_keywords(linear.weight.dtype, mesh),
            bias=False,
            gather_output=False,
            disable_grad_reduce=True,
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)[0]
        return out


class RowParallelLinear(tensor_parallel.RowParallelLinear):  # type: ignore[misc]
    """Holds a share of the input features: (T, in / tp) -> (T, out) whole, summed over tp."""

    def __init__(self, linear: nn.Linear, mesh: Mesh):
        super().__init__(
            linear.in_features,
            linear.out_features,
            **_keywords(linear.weight.dtype, mesh),
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)[0]
        return out


class VocabParallelEmbedding(tensor_parallel.VocabParallelEmbedding):  # type: ignore[misc]
    """Holds a share of the rows; tokens of other shares add zero, and the sum over tp is whole."""

    def __init__(self, embedding: nn.Embedding, mesh: Mesh):
        super().__init__(embedding.num_embeddings, embedding.embedding_dim, **_keywords(embedding.weight.dtype, mesh))


def copy_to_tp(x: Tensor, mesh: Mesh) -> Tensor:
    """x as it is; its gradient is summed over tp."""
    copied: Tensor = tensor_parallel.copy_to_tensor_model_parallel_region(x, group=mesh.tp.group)
    return copied


def sum_over_tp(x: Tensor, mesh: Mesh) -> Tensor:
    """The sum over tp; the gradient passes as it is. Changes x in place."""
    # A non-contiguous x would come back unreduced, without a word (mappings.py, _reduce).
    assert x.is_contiguous(), "sum_over_tp needs a contiguous tensor"
    total: Tensor = tensor_parallel.reduce_from_tensor_model_parallel_region(x, group=mesh.tp.group)
    return total


def vocab_parallel_cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Loss of each token from (T, V / tp) logits, (T,), fp32. Overwrites fp32 logits."""
    loss_T: Tensor = tensor_parallel.vocab_parallel_cross_entropy(logits_TV, targets_T)
    return loss_T


class Stage(nn.Module):
    """A pipeline stage as megatron-core's schedules drive it: they hand in the previous stage's output."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, module: nn.Module, dtype: torch.dtype, hidden_size: int):
        super().__init__()
        self.module = module
        self.config = _config(dtype, hidden_size)
        self.received: Tensor | None = None

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        self.received = tensors[0]


def run_1f1b(
    stage: Stage,
    forward: Callable[[nn.Module, int, Tensor | None], Tensor],
    micro_batches: int,
    tokens: int,
    forward_only: bool,
) -> None:
    """Runs `forward(module, i, x_TD)` of every micro-batch i, and its backward, one forward one backward.

    `forward` returns the residual stream (tokens, D), or the loss on the last stage, scaled.
    """

    def forward_step(numbers: Iterator[int], stage: Stage) -> tuple[Tensor, Callable[[Tensor], Any]]:
        # The schedules exchange (sequence, batch, D).
        received = None if stage.received is None else stage.received.squeeze(1)
        out = forward(stage.module, next(numbers), received)
        out = out.unsqueeze(1) if out.dim() == 2 else out
        return out, lambda loss: (loss, torch.zeros((), dtype=torch.int, device=loss.device), None)

    forward_backward_pipelining_without_interleaving(
        forward_step_func=forward_step,
        data_iterator=iter(range(micro_batches)),
        model=stage,
        num_microbatches=micro_batches,
        seq_length=tokens,
        micro_batch_size=1,
        forward_only=forward_only,
    )
