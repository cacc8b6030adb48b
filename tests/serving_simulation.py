"""A server that runs at random: sequences join, grow, fork, are rolled back and leave over one pool of pages; all is checked.

The server keeps books as a real one does (a free list, reference counts, copy on write, page tables made anew each step) and
each sequence's true keys and values beside the pool. A step appends some rows to some sequences in one call, dense or packed.
Its out and lse go to the oracle over the true rows; when a sequence leaves, its rows in the pool must have the true bits.
Freed pages, rolled-back rows and all that was never written hold NaN. With one page a sequence the cache is a contiguous
one, and the call names its entries by cache_batch_idx.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

import tessera
from tessera import reference
from tessera.mask import Mask, MaskSpec
from tessera.operands import NO_LENGTHS, Lengths, Operands
from tessera.problem import Layout, Problem, Score, Shape
from tessera.serving.cases import OUTSIDE, CacheCase
from tessera.verify import compare

NAN = float("nan")


@dataclass(frozen=True)
class Setting:
    """The server's sizes. `capacity` is the longest sequence, a multiple of `page_size`; equal to it, the cache is contiguous."""

    page_size: int = 4
    capacity: int = 32
    pages: int = 40
    heads_q: int = 4
    heads_kv: int = 2
    head_dim: int = 8
    most_sequences: int = 6
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    window: int | None = None
    options: dict[str, object] = field(default_factory=dict)

    @property
    def is_paged(self) -> bool:
        return self.page_size < self.capacity

    def cases(self) -> tuple[CacheCase, ...]:
        """Calls like the server's: what there is to compile before it starts."""
        common = {
            "heads_q": self.heads_q, "heads_kv": self.heads_kv, "head_dim": self.head_dim, "capacity": self.capacity,
            "page_size": self.page_size if self.is_paged else None, "indexed": not self.is_paged,
            "window": None if self.window is None else (self.window, 0), **self.options,
        }  # fmt: skip
        dense = (CacheCase("", (1,) * batch, rows, rows, **common) for batch in (1, 3) for rows in (1, 2, 4))  # type: ignore[arg-type]
        packed = (CacheCase("", (1,) * len(rows), 1, 1, rows, **common) for rows in ((1,), (7, 7, 2)))  # type: ignore[arg-type]
        return (*dense, *packed)


@dataclass(eq=False)
class Held:
    """One sequence: its pages, how many rows it has, and what they truly are, (capacity, heads_kv, head_dim) on the CPU."""

    pages: list[int]
    length: int
    keys: Tensor
    values: Tensor


class Server:
    """The pool, the books, and one random step after the other."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting, self.random = setting, random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        shape = (setting.pages, setting.page_size, setting.heads_kv, setting.head_dim)
        self.k_cache, self.v_cache = (torch.full(shape, NAN, dtype=setting.dtype, device=setting.device) for _ in range(2))
        self.free = list(range(setting.pages))
        self.users = [0] * setting.pages
        self.sequences: list[Held] = []
        self.counts: Counter[str] = Counter()

    def run(self, steps: int) -> Counter[str]:
        """So many steps, then everyone leaves; what happened how often."""
        for _ in range(steps):
            self._come_and_go()
            self._step()
        while self.sequences:
            self._leave(self.sequences[-1])
        assert sorted(self.free) == list(range(self.setting.pages)), "a page leaked"
        assert not any(self.users)
        return self.counts

    def _come_and_go(self) -> None:
        draw = self.random.random()
        if self.sequences and (draw < 0.07 or len(self.sequences) == self.setting.most_sequences):
            self._leave(self.random.choice(self.sequences))
        elif draw < 0.33:
            shape = (self.setting.capacity, self.setting.heads_kv, self.setting.head_dim)
            self.sequences.append(Held([], 0, *(torch.zeros(shape, dtype=self.setting.dtype) for _ in range(2))))
            self.counts["joined"] += 1
        elif self.sequences and draw < 0.43:
            self._fork(self.random.choice(self.sequences))
        elif self.sequences and draw < 0.53:
            self._roll_back(self.random.choice(self.sequences))

    def _leave(self, sequence: Held) -> None:
        """Its rows in the pool are the true ones; then its pages go back."""
        for cache, true in ((self.k_cache, sequence.keys), (self.v_cache, sequence.values)):
            if sequence.pages:
                found = cache[sequence.pages].flatten(0, 1)[: sequence.length].cpu()
                assert torch.equal(found, true[: sequence.length]), "a row in the pool is not what was appended"
        for page in sequence.pages:
            self._release(page)
        self.sequences.remove(sequence)
        self.counts["left"] += 1

    def _fork(self, sequence: Held) -> None:
        """A second sequence with the same rows so far: pages are shared."""
        for page in sequence.pages:
            self.users[page] += 1
        own = Held(list(sequence.pages), sequence.length, sequence.keys.clone(), sequence.values.clone())
        self.sequences.append(own)
        self.counts["forked"] += 1

    def _roll_back(self, sequence: Held) -> None:
        """Its last rows are taken back, as a server does with drafts that were not accepted."""
        length = self.random.randint(max(0, sequence.length - 5), sequence.length)
        kept = -(-length // self.setting.page_size)
        while len(sequence.pages) > kept:
            self._release(sequence.pages.pop())
        if kept and self.users[sequence.pages[-1]] == 1:
            for cache in (self.k_cache, self.v_cache):
                cache[sequence.pages[-1], length - (kept - 1) * self.setting.page_size :] = NAN
        sequence.length = length
        self.counts["rolled back"] += 1

    def _take(self) -> int:
        page = self.free.pop(self.random.randrange(len(self.free)))
        self.users[page] = 1
        self.counts["pages taken"] += 1
        return page

    def _release(self, page: int) -> None:
        self.users[page] -= 1
        if self.users[page] == 0:
            self.k_cache[page], self.v_cache[page] = NAN, NAN
            self.free.append(page)

    def _make_room(self, sequence: Held, new: int) -> bool:
        """Pages for `new` more rows, none of them shared where rows are written; False where there is no room."""
        size, total = self.setting.page_size, sequence.length + new
        wanted = -(-total // size) - len(sequence.pages)
        last = sequence.length // size
        is_shared = new > 0 and last < len(sequence.pages) and self.users[sequence.pages[last]] > 1
        if total > self.setting.capacity or wanted + is_shared > len(self.free):
            return False
        if is_shared:
            shared, own = sequence.pages[last], self._take()
            for cache in (self.k_cache, self.v_cache):
                cache[own] = cache[shared]
            self._release(shared)
            sequence.pages[last] = own
            self.counts["copied on write"] += 1
        sequence.pages += [self._take() for _ in range(wanted)]
        return True

    def _step(self) -> None:
        """New rows for some sequences in one call; its answer against the oracle."""
        chosen = [s for s in self.sequences if self.random.random() < 0.8]
        dense = self.random.random() < 0.5
        rows = self.random.choice((1, 1, 1, 2, 4))
        lengths = [rows if dense else self.random.choice((0, 1, 1, 2, 7)) for _ in chosen]
        able = [(s, n) for s, n in zip(chosen, lengths, strict=True) if self._make_room(s, n)]
        if not able:
            self.counts["idle"] += 1
            return
        drawn = [self._draw(sum(n for _, n in able), heads) for heads in (self.setting.heads_q, *[self.setting.heads_kv] * 2)]
        start = 0
        for sequence, n in able:
            for true, new in ((sequence.keys, drawn[1]), (sequence.values, drawn[2])):
                true[sequence.length : sequence.length + n] = new[start : start + n]
            start += n
        self._check(able, drawn, self._call(able, drawn, dense))
        for sequence, n in able:
            sequence.length += n
        self.counts["steps dense" if dense else "steps packed"] += 1
        self.counts["rows"] += start

    def _draw(self, rows: int, heads: int) -> Tensor:
        return torch.randn(rows, heads, self.setting.head_dim, generator=self.generator).to(self.setting.dtype)

    def _numbers(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.setting.device)

    def _call(self, able: list[tuple[Held, int]], drawn: list[Tensor], dense: bool) -> tuple[Tensor, Tensor]:
        """(out, lse) packed, from the call in whichever form."""
        setting = self.setting
        q, k, v = (x.to(setting.device) for x in drawn)
        options: dict[str, object] = {"causal": True, "window": (setting.window, 0), "return_lse": True, **setting.options}
        if setting.is_paged:
            columns = setting.capacity // setting.page_size
            table = [s.pages + [OUTSIDE] * (columns - len(s.pages)) for s, _ in able]
            options["page_table"] = torch.tensor(table, dtype=torch.int32, device=setting.device)
        else:  # a sequence without rows has no page yet: any entry will do, for nothing of it is read
            options["cache_batch_idx"] = self._numbers([(s.pages or self.free)[0] for s, _ in able])
        lengths = self._numbers([s.length for s, _ in able])
        if dense:
            q, k, v = (x.unflatten(0, (len(able), -1)) for x in (q, k, v))
        else:
            options["cu_seqlens_q"] = self._numbers(_offsets([n for _, n in able]))
        out, lse = tessera.attention_with_kvcache(q, self.k_cache, self.v_cache, cache_seqlens=lengths, k=k, v=v, **options)  # type: ignore[call-overload]
        return (out.flatten(0, 1), lse.transpose(0, 1).flatten(1)) if dense else (out, lse)

    def _check(self, able: list[tuple[Held, int]], drawn: list[Tensor], results: tuple[Tensor, Tensor]) -> None:
        setting = self.setting
        keys, values = (torch.cat([x[: s.length + n] for (s, n), x in zip(able, true, strict=True)])
                        for true in ([s.keys for s, _ in able], [s.values for s, _ in able]))  # fmt: skip
        shape = Shape(len(able), len(drawn[0]), len(keys), setting.heads_q, setting.heads_kv, *[setting.head_dim] * 2)
        problem = Problem(shape, setting.dtype, Score(setting.head_dim**-0.5), Layout.VARLEN, MaskSpec(setting.window, 0))
        ends_q, ends_k = _offsets([n for _, n in able]), _offsets([s.length + n for s, n in able])
        lengths = NO_LENGTHS._replace(cu_seqlens_q=torch.tensor(ends_q), cu_seqlens_k=torch.tensor(ends_k))
        assert isinstance(lengths, Lengths)
        operands = Operands(drawn[0], keys, values, lengths, Mask(), None, None, None, 0)
        refs = reference.attention(problem, operands)
        # float32 keeps to the rule's noise alone; eager's own error is allowed where that is far above it
        eagers = refs if setting.dtype == torch.float32 else reference.attention(problem, operands, setting.dtype)
        for name, result, ref, eager in zip(("out", "lse"), results, refs, eagers, strict=True):
            compared = compare(name, result.cpu(), ref, eager)
            assert compared.ok, f"step {self.counts}: {compared}"
            self.counts["comparisons"] += 1


def _offsets(lengths: list[int]) -> list[int]:
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return ends
