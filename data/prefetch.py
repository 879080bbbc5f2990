"""Prefetches the shards of the next steps in the background during the current one."""

import threading
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from types import TracebackType

from triplane.data.corpus import Corpus
from triplane.storage.errors import DataError


class Prefetcher:
    """Fetches shards in the order of a plan, as far ahead as a budget allows.

    The plan yields for each step the numbers of the shards that it reads. The distinct shards of the current step and
    those fetched ahead stay within `budget_bytes`: if the budgets of all processes fit into the cache, none evicts what
    another will still read. Processes with the same plan fetch nothing twice, since the cache lets one fetch while the
    others wait.
    """

    def __init__(self, corpus: Corpus, plan: Iterable[Sequence[int]], budget_bytes: int):
        self._corpus = corpus
        self._plan = plan
        self._budget_bytes = budget_bytes
        self._sizes = [shard.data.bytes + shard.index.bytes for shard in corpus.manifest.shards]
        self._changed = threading.Condition()
        # The condition guards everything below.
        self._window: deque[Sequence[int]] = deque()
        self._held: Counter[int] = Counter()
        self._held_bytes = 0
        self._is_current = False
        self._is_ended = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def __enter__(self) -> "Prefetcher":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops after the transfer in progress."""
        with self._changed:
            self._is_ended = True
            self._changed.notify_all()
        self._thread.join()

    def next_step(self) -> None:
        """Finishes the reader's current step, and returns when the shards of the next one are local.

        Raises the exceptions of the thread, DataError if a step does not fit into the budget.
        """
        with self._changed:
            if self._is_current:
                self._drop_oldest()
            self._is_current = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._window or self._error or self._is_ended)
            if not self._window and self._error:
                raise self._error

    def _run(self) -> None:
        try:
            for step in self._plan:
                if not self._admit(step):
                    break
                for number in step:
                    self._corpus.fetch(number)
                with self._changed:
                    self._window.append(step)
                    self._changed.notify_all()
        except BaseException as error:  # the reader raises it
            self._error = error
        with self._changed:
            self._is_ended = True
            self._changed.notify_all()

    def _admit(self, step: Sequence[int]) -> bool:
        """Waits until `step` fits into the budget; False if the reader has left."""
        needed = sum(self._sizes[number] for number in step)
        if needed > self._budget_bytes:
            raise DataError(
                f"{self._corpus.location}: a step reads {len(step)} shards of {needed / 2**30:.3g} GiB in total, more "
                f"than this process's {self._budget_bytes / 2**30:.3g} GiB of the cache: raise data.cache_gib, lower "
                f"data.shuffle_window or prepare smaller shards"
            )
        with self._changed:
            self._changed.wait_for(lambda: self._is_ended or self._with(step) <= self._budget_bytes)
            if self._is_ended:
                return False
            self._held_bytes = self._with(step)
            self._held.update(step)
        return True

    def _with(self, step: Sequence[int]) -> int:
        return self._held_bytes + sum(self._sizes[number] for number in step if not self._held[number])

    def _drop_oldest(self) -> None:
        for number in self._window.popleft():
            self._held[number] -= 1
            if not self._held[number]:
                del self._held[number]
                self._held_bytes -= self._sizes[number]
