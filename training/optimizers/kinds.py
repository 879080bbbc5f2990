"""The kinds of optimizer that a config can name."""

from typing import Annotated

from pydantic import Field

from triplane.model.part import default_kind
from triplane.training.optimizers.adamw import AdamW
from triplane.training.optimizers.lion import Lion
from triplane.training.optimizers.muon import Muon

AnyOptimizer = Annotated[AdamW | Lion | Muon, Field(discriminator="kind"), default_kind("adamw")]
