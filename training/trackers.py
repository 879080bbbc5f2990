"""Weights & Biases and trackio. Both resume the same run after each start: it is named by the run's id."""

import os
from collections.abc import Iterator, Mapping
from html import escape
from importlib.util import find_spec
from pathlib import Path

from triplane.training.callback import Callback, Run

_PROJECT = "triplane"
_ALERTS = ("rollback", "save failed")
"""Events that a person should hear of."""


class Wandb(Callback):
    """Records in the project that WANDB_PROJECT names, with the package's other settings from its own variables."""

    def problems(self) -> Iterator[str]:
        yield from _missing("wandb")
        if find_spec("wandb") is None:
            return
        import wandb

        settings = wandb.setup().settings
        ready = settings._offline or settings._noop or wandb.login(prompt=False)
        wandb.teardown()  # else ranks, even those of a job, would look for this process's service
        if not ready:
            yield "no API key; give one by `wandb login`, or set WANDB_MODE=offline"

    def start(self, run: Run) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=run.id,
            resume="allow",
            name=run.config.run_dir,
            dir=run.config.run_dir,
            config=dict(run.choices),
            settings=wandb.Settings(console="off"),  # rank 0's is in the run folder
        )
        # Its own steps may not decrease, which ours do after a rollback.
        self._run.define_metric("*", step_metric="step")
        # It says so itself on standard error, which of a rank is a file.
        print(f"wandb: {self._run.url or Path(self._run.dir).parent}", flush=True)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def sample(self, step: int, text: str) -> None:
        import wandb

        self._run.log({"step": step, "sample": wandb.Html(f"<pre>{escape(text)}</pre>", inject=False)})

    def event(self, step: int, event: str, details: Mapping[str, object]) -> None:
        if event in _ALERTS:
            self._run.alert(title=event, text=f"step {step}: {_listed(details)}")

    def close(self) -> None:
        self._run.finish()


class Trackio(Callback):
    """Records on this machine, or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says."""

    def problems(self) -> Iterator[str]:
        yield from _missing("trackio")

    def start(self, run: Run) -> None:
        import trackio

        name = f"{Path(run.config.run_dir).name}-{run.id[:8]}"
        self._run = trackio.init(_PROJECT, name, resume="allow", config=dict(run.choices), embed=False)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def sample(self, step: int, text: str) -> None:
        import trackio

        self._run.log({"sample": trackio.Markdown("".join(f"    {line}\n" for line in text.splitlines()))}, step=step)

    def event(self, step: int, event: str, details: Mapping[str, object]) -> None:
        if event in _ALERTS:
            self._run.alert(event, text=f"step {step}: {_listed(details)}")

    def close(self) -> None:
        self._run.finish()


def _missing(package: str) -> Iterator[str]:
    if find_spec(package) is None:
        yield f"the package {package} is not installed; install it by `pip install 'triplane[{package}]'`"


def _listed(details: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in details.items())
