"""How a plan looks on a console."""

from rich.console import Console

from triplane.plan.estimate import Estimate
from triplane.plan.gpus import RESERVED_GIB, Gpu
from triplane.plan.search import Search
from triplane.plan.tables import plain_table

_GIB = 2**30
_BEST = 10
"""Layouts of a search that are shown."""


class Show:
    """Prints the parts of a plan."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)

    def text(self, line: str = "") -> None:
        self._console.print(line, markup=False)

    def facts(self, facts: dict[str, str]) -> None:
        """Names and values, in two columns."""
        width = max(map(len, facts))
        for name, value in facts.items():
            self.text(f"{name:<{width}}  {value}")

    def memory(self, answer: Estimate, gpu: Gpu) -> None:
        """A row for each kind of rank."""
        room = gpu.memory_gib - RESERVED_GIB
        self.text(f"\nGiB at the peak of a step, of {room:,.1f} that a GPU has for it")
        parts = ("weights", "gradients", "optimizer", "activations", "temporary")
        table = plain_table("", *parts, "in all")
        for name, memory in answer.memory.items():
            gib = [getattr(memory, part) / _GIB for part in (*parts, "total")]
            table.add_row(name, *(f"{value:,.1f}" for value in gib))
        self._console.print(table)

    def speed(self, answer: Estimate) -> None:
        """Where a step's time goes."""
        speed = answer.speed
        spent = {
            "products and attention": speed.products_s,
            "other work in blocks": speed.memory_s,
            "tensor-parallel traffic": speed.tensor_s,
            "context-parallel traffic": speed.context_s,
            "waiting in the pipeline": speed.pipeline_s,
            "gradients and weights over dp": speed.data_s,
            "update": speed.update_s,
        }
        self.text()
        table = plain_table("a step", "s", "%")
        for name, seconds in spent.items():
            if seconds:
                table.add_row(name, f"{seconds:,.3f}", f"{100 * seconds / speed.step_s:.1f}")
        table.add_row("in all", f"{speed.step_s:,.3f}", "")
        self._console.print(table)

    def search(self, results: Search, changed: list[list[str]]) -> None:
        """The fastest layouts, each with the overrides that make it, and why others do not fit."""
        self.text(f"\n{len(results.found):,} layouts fit; the fastest:")
        table = plain_table("MFU", "tokens/s", "GiB")
        table.add_column("overrides")
        for one, keys in list(zip(results.found, changed))[:_BEST]:
            speed = one.estimate.speed
            figures = (f"{100 * speed.mfu:.1f} %", f"{speed.tokens_per_s:,.0f}", f"{one.estimate.peak_gib:,.1f}")
            table.add_row(*figures, " ".join(keys) or "(as it is)")
        self._console.print(table)
        if results.refused:
            self.text("\nlayouts that do not fit, and why the first of them does not:")
        for refusal in results.refused:
            self.text(f"{refusal.layouts:>6,}  {refusal.reason}")

    def warnings(self, warnings: list[str]) -> None:
        """What a run may do, and seldom means."""
        for warning in warnings:
            self.text(f"\nwarning: {warning}")

    def problems(self, problems: list[str], hint: str | None) -> None:
        """All that is wrong, last, where it is seen."""
        self.text(f"\n{_count(len(problems), 'problem')}{':' if problems else ''}")
        for problem in problems:
            self.text(f"- {problem}")
        if hint is not None:
            self.text(f"\n{hint}")


def _count(number: int, name: str) -> str:
    return f"{number or 'no'} {name}{'' if number == 1 else 's'}"
