"""Training speed of one process beside its peers: the same model, tokens and threads, at their own settings.

Each contender runs in a process of its own, in turns, so that a busy machine is busy for all of them. Tokens are
random, which costs what text costs. A step is forward, backward, clipping by the global norm, AdamW. `--setup` makes an
environment for each peer, since no two of them agree on the versions of their libraries; it takes some minutes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from environments import python, set_up

VOCAB_SIZE, DIM, HIDDEN_DIM, N_LAYERS = 8192, 384, 1024, 6
N_HEADS, N_KV_HEADS, HEAD_DIM = 6, 2, 64
SEQUENCES, SEQ_LEN = 8, 512
OPTIMIZER = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
GRAD_CLIP = 1.0

Step = Callable[[], object]


def random_steps() -> Iterator[tuple]:
    """(inputs, targets) of a step, (SEQUENCES, SEQ_LEN) each."""
    import torch

    generator = torch.Generator().manual_seed(0)
    while True:
        tokens = torch.randint(VOCAB_SIZE, (SEQUENCES, SEQ_LEN + 1), generator=generator)
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def triplane(seconds: float, precision: str, compiled: bool) -> list[float]:
    """`Engine`, as `triplane train` runs it."""
    import torch

    from triplane.model.batch import Batch
    from triplane.model.config import ModelConfig
    from triplane.parallel.config import ParallelConfig
    from triplane.parallel.engine import Engine
    from triplane.parallel.groups import connected
    from triplane.training.hardware import DTYPES
    from triplane.training.optimizers.adamw import AdamW

    config = ModelConfig(
        vocab_size=VOCAB_SIZE,
        dim=DIM,
        hidden_dim=HIDDEN_DIM,
        n_layers=N_LAYERS,
        n_heads=N_HEADS,
        n_kv_heads=N_KV_HEADS,
        head_dim=HEAD_DIM,
    )
    layout = ParallelConfig(compile=compiled)
    with connected(layout, torch.device("cpu"), rank=0, world_size=1) as mesh:
        engine = Engine(
            config,
            layout,
            mesh,
            dtype=DTYPES[precision],
            seq_len=SEQ_LEN,
            optimizer=AdamW(grad_clip=GRAD_CLIP),
        )
        engine.initialize(seed=0)
        bounds = range(0, SEQUENCES * SEQ_LEN + 1, SEQ_LEN)
        data = random_steps()

        def step() -> None:
            inputs, targets = next(data)
            loss = engine.forward_backward([Batch.build(inputs.flatten(), targets.flatten(), bounds)])
            engine.step(OPTIMIZER["lr"])
            float(loss.cross_entropy)

        return timed(step, seconds)


def plain(seconds: float, precision: str, compiled: bool) -> list[float]:
    """A model and a loop as one would write them in an afternoon."""
    import torch
    from plain_model import PlainModel
    from torch.nn import functional as F

    torch.manual_seed(0)
    model = PlainModel(VOCAB_SIZE, DIM, HIDDEN_DIM, N_LAYERS, N_HEADS, N_KV_HEADS, HEAD_DIM, SEQ_LEN)
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **OPTIMIZER)
    data = random_steps()

    def step() -> None:
        inputs, targets = next(data)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = F.cross_entropy(forward(inputs).flatten(0, 1).float(), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return timed(step, seconds)


def litgpt(seconds: float, precision: str, compiled: bool) -> list[float]:
    """litgpt's model in the loop of its `pretrain`."""
    import lightning
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    config = Config(
        block_size=SEQ_LEN,
        padded_vocab_size=VOCAB_SIZE,
        n_layer=N_LAYERS,
        n_head=N_HEADS,
        n_query_groups=N_KV_HEADS,
        head_size=HEAD_DIM,
        n_embd=DIM,
        intermediate_size=HIDDEN_DIM,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    kinds = {"fp32": "32-true", "bf16": "bf16-mixed", "bf16 weights": "bf16-true"}
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=kinds[precision])
    fabric.seed_everything(0, verbose=False)
    with fabric.init_module():
        model = GPT(config)
    model = fabric.setup(torch.compile(model) if compiled else model)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), fused=True, **OPTIMIZER))
    data = random_steps()

    def step() -> None:
        inputs, targets = next(data)
        loss = chunked_cross_entropy(model(inputs), targets)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return timed(step, seconds)


def hugging_face(seconds: float, precision: str, compiled: bool) -> list[float]:
    """Trainer with LlamaForCausalLM."""
    import tempfile

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=DIM,
        intermediate_size=HIDDEN_DIM,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=SEQ_LEN,
        use_cache=False,
    )

    class Tokens(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[dict]:
            for inputs, _ in random_steps():  # the model shifts its labels
                yield from ({"input_ids": row, "labels": row} for row in inputs)

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.ends.append(time.perf_counter())
            control.should_training_stop = done(self.ends, seconds)

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            max_steps=10_000,
            per_device_train_batch_size=SEQUENCES,
            learning_rate=OPTIMIZER["lr"],
            adam_beta2=OPTIMIZER["betas"][1],
            weight_decay=OPTIMIZER["weight_decay"],
            max_grad_norm=GRAD_CLIP,
            optim="adamw_torch_fused",
            bf16=precision == "bf16",
            torch_compile=compiled,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Trainer(LlamaForCausalLM(config), arguments, train_dataset=Tokens(), callbacks=[clock]).train()
    return differences(clock.ends)


WARM_UP_STEPS = 3


def timed(step: Step, seconds: float) -> list[float]:
    ends: list[float] = []
    while not done(ends, seconds):
        step()
        ends.append(time.perf_counter())
    return differences(ends)


def done(ends: list[float], seconds: float) -> bool:
    return len(ends) > WARM_UP_STEPS + 2 and ends[-1] - ends[WARM_UP_STEPS] > seconds


def differences(ends: list[float]) -> list[float]:
    """Seconds of each step after the warm-up, in which compilers compile."""
    return [after - before for before, after in zip(ends[WARM_UP_STEPS:], ends[WARM_UP_STEPS + 1 :])]


CONTENDERS: dict[str, Callable[[float], list[float]]] = {
    "triplane, fp32": lambda s: triplane(s, "fp32", False),
    "triplane, bf16": lambda s: triplane(s, "bf16", False),
    "triplane, fp32, compiled": lambda s: triplane(s, "fp32", True),
    "triplane, bf16, compiled": lambda s: triplane(s, "bf16", True),
    "plain loop, fp32": lambda s: plain(s, "fp32", False),
    "plain loop, fp32, compiled": lambda s: plain(s, "fp32", True),
    "plain loop, bf16": lambda s: plain(s, "bf16", False),
    "plain loop, bf16, compiled": lambda s: plain(s, "bf16", True),
    "litgpt, fp32": lambda s: litgpt(s, "fp32", False),
    "litgpt, fp32, compiled": lambda s: litgpt(s, "fp32", True),
    "litgpt, bf16-mixed, compiled": lambda s: litgpt(s, "bf16", True),
    "litgpt, bf16-true, compiled": lambda s: litgpt(s, "bf16 weights", True),
    "Hugging Face, fp32": lambda s: hugging_face(s, "fp32", False),
    "Hugging Face, fp32, compiled": lambda s: hugging_face(s, "fp32", True),
    "Hugging Face, bf16": lambda s: hugging_face(s, "bf16", False),
    "Hugging Face, bf16, compiled": lambda s: hugging_face(s, "bf16", True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20, help="of steps, in each process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--setup", action="store_true", help="make the peers' environments, and end")
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        import torch

        torch.set_num_threads(options.threads)
        print(json.dumps(CONTENDERS[options.child](options.seconds)))
        return
    if options.setup:
        set_up()
        return
    absent = [name for name in options.only if not python(name).exists()]
    if absent:
        parser.error(f"no environment for {', '.join(absent)}: make it with {sys.argv[0]} --setup")
    rounds: dict[str, list[list[float]]] = {name: [] for name in options.only}
    for number in range(options.rounds):
        for name in options.only:
            speeds = [SEQUENCES * SEQ_LEN / step_s for step_s in run(name, options)]
            rounds[name].append(speeds)
            load = os.getloadavg()[0]
            print(f"{number + 1} {name}: {statistics.median(speeds):.0f} tokens/s, load {load:.1f}", flush=True)
    print("\n| contender | tokens/s: median of the rounds' medians (lowest, highest) | fastest step |")
    print("| --- | --- | --- |")
    for name in options.only:
        medians = [statistics.median(speeds) for speeds in rounds[name]]
        fastest = max(map(max, rounds[name]))
        middle = statistics.median(medians)
        print(f"| {name} | {middle:,.0f} ({min(medians):,.0f}, {max(medians):,.0f}) | {fastest:,.0f} |")


def run(name: str, options: argparse.Namespace) -> list[float]:
    command = [str(python(name)), __file__, "--child", name]
    command += ["--seconds", str(options.seconds), "--threads", str(options.threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(answer.splitlines()[-1])


if __name__ == "__main__":
    main()
