"""Prints a plan on a console."""

from rich.console import Console

from triplane.plan.estimate import Estimate
from triplane.plan.gpus import RESERVED_GIB, Gpu
from triplane.plan.search import Search
from triplane.plan.tables import plain_table

_GIB = 2**30
_BEST = 10
"""Number of layouts of a search shown."""


class Show:
    """Prints the parts of a plan."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)

    def text(self, line: str = "") -> None:
        self._console.print(line, markup=False)

    def facts(self, facts: dict[str, str]) -> None:
        """Prints names and values in two columns."""
        width = max(map(len, facts))
        for name, value in facts.items():
            self.text(f"{name:<{width}}  {value}")

    def memory(self, answer: Estimate, gpu: Gpu) -> None:
        """Prints a column for each kind of rank."""
        room = gpu.memory_gib - RESERVED_GIB
        self.text(f"\npeak GiB during a step, of {room:,.1f} available per GPU")
        parts = ("weights", "gradients", "optimizer", "activations", "temporary")
        table = plain_table("", *answer.memory)
        table.columns[0].no_wrap = True  # a narrow terminal wraps the names of ranks
        for part in (*parts, "total"):
            table.add_row(part, *(f"{getattr(memory, part) / _GIB:,.1f}" for memory in answer.memory.values()))
        self._console.print(table)

    def speed(self, answer: Estimate) -> None:
        """Prints the time of a step by cause."""
        speed = answer.speed
        spent = {
            "products and attention": speed.products_s,
            "other work in blocks": speed.memory_s,
            "tensor-parallel traffic": speed.tensor_s,
            "traffic over cp and ep": speed.context_s,
            "waiting in the pipeline": speed.pipeline_s,
            "gradients and weights over dp": speed.data_s,
            "update": speed.update_s,
        }
        self.text()
        table = plain_table("step", "s", "%")
        for name, seconds in spent.items():
            if seconds:
                table.add_row(name, f"{seconds:,.3f}", f"{100 * seconds / speed.step_s:.1f}")
        table.add_row("total", f"{speed.step_s:,.3f}", "")
        self._console.print(table)

    def search(self, results: Search, changed: list[list[str]]) -> None:
        """Prints the fastest layouts with their overrides, and why others do not fit."""
        self.text(f"\n{len(results.found):,} layouts fit; the fastest:")
        table = plain_table("MFU", "tokens/s", "GiB")
        table.add_column("overrides", overflow="fold")
        for layout, keys in list(zip(results.found, changed))[:_BEST]:
            speed = layout.estimate.speed
            figures = (f"{100 * speed.mfu:.1f} %", f"{speed.tokens_per_s:,.0f}", f"{layout.estimate.peak_gib:,.1f}")
            table.add_row(*figures, " ".join(keys) or "(unchanged)")
        self._console.print(table)
        if results.found:
            self.text("\nthe overrides of the fastest, to copy:")
            self.text(" ".join(changed[0]) or "(none)")
        if results.refused:
            self.text("\nlayouts that do not fit, with the first one's reason:")
        for refusal in results.refused:
            self.text(f"{refusal.layouts:>6,}  {refusal.reason}")

    def warnings(self, warnings: list[str]) -> None:
        """Prints what is allowed but rarely intended."""
        for warning in warnings:
            self.text(f"\nwarning: {warning}")

    def problems(self, problems: list[str], hint: str | None) -> None:
        """Prints all problems; comes last, where they are seen."""
        self.text(f"\n{_count(len(problems), 'problem')}{':' if problems else ''}")
        for problem in problems:
            self.text(f"- {problem}")
        if hint is not None:
            self.text(f"\n{hint}")


def _count(number: int, name: str) -> str:
    return f"{number or 'no'} {name}{'' if number == 1 else 's'}"
